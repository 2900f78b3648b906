"""Numbers that Meta CLIP 2 reports (arXiv 2507.22062, tables 1, 3 and 4), in per cent, shown beside our own.

"WW" is the worldwide recipe, with billions of pairs seen; B/32 rows are from table 3 and name their tokenizer.
"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

SLIP_26: Mapping[str, str] = {
    **dict.fromkeys(("food101", "cifar10", "cifar100", "cub200", "sun397", "stanford_cars", "dtd", "mnist"), "top1"),
    **dict.fromkeys(("fer2013", "stl10", "eurosat", "resisc45", "gtsrb", "kitti", "country211", "pcam"), "top1"),
    **dict.fromkeys(("ucf101", "clevr_counts", "rendered_sst2", "imagenet"), "top1"),
    **dict.fromkeys(("fgvc_aircraft", "oxford_pets", "caltech101", "flowers102"), "mean_per_class_top1"),
    "kinetics700": "mean_top1_top5",
    "hateful_memes": "roc_auc",
}
"""The sets of SLIP's zero-shot evaluation (Mu et al. 2021, arXiv 2112.12750), by their names in
``configs/eval/slip26.yaml``, and their metrics; SLIP-26 is the mean of the 26 numbers."""

DATACOMP_38: Mapping[str, str | tuple[str, ...]] = {
    **dict.fromkeys(("cifar10", "cifar100", "clevr_counts", "clevr_distance", "country211", "dtd", "eurosat"), "top1"),
    **dict.fromkeys(("food101", "gtsrb", "kitti", "mnist", "pcam", "rendered_sst2", "resisc45", "svhn"), "top1"),
    **dict.fromkeys(("stanford_cars", "stl10", "sun397", "voc2007", "camelyon17", "objectnet"), "top1"),
    **dict.fromkeys(("imagenet", "imagenet_sketch", "imagenetv2", "imagenet_a", "imagenet_o", "imagenet_r"), "top1"),
    **dict.fromkeys(("caltech101", "fgvc_aircraft", "flowers102", "oxford_pets"), "mean_per_class_top1"),
    **dict.fromkeys(("flickr30k", "mscoco"), ("text_to_image_R@1", "image_to_text_R@1")),
    "winogavil": "jaccard_10_up",
    "iwildcam": "macro_f1",
    "fmow": "worst_group_top1",
    "datacomp_geode": "worst_group_top1",
    "datacomp_dollar_street": "worst_group_top5",
}
"""DataComp's 38 sets (Gadre et al. 2023, arXiv 2304.14108), by their names in ``configs/eval/datacomp.yaml``, and their
main metrics from its task list; several metrics are averaged. DataComp-38 is the mean of the 38 numbers."""

MEANS: Mapping[str, Mapping[str, str | tuple[str, ...]]] = {"SLIP-26": SLIP_26, "DataComp-38": DATACOMP_38}
"""Columns that are the mean of several sets."""

COLUMNS = {
    "ImageNet": ("imagenet", "top1"),
    "Babel-ImageNet": ("babel_imagenet", "top1"),
    "XM3600 T2I": ("xm3600", "text_to_image_R@1"),
    "XM3600 I2T": ("xm3600", "image_to_text_R@1"),
    "CVQA EN": ("cvqa", "EN"),
    "CVQA LOCAL": ("cvqa", "LOCAL"),
    "Flickr30k-200 T2I": ("flickr30k_200", "text_to_image_R@1"),
    "Flickr30k-200 I2T": ("flickr30k_200", "image_to_text_R@1"),
    "XTD-10 T2I": ("xtd10", "text_to_image_R@1"),
    "XTD-10 I2T": ("xtd10", "image_to_text_R@1"),
    "XTD-200 T2I": ("xtd200", "text_to_image_R@1"),
    "XTD-200 I2T": ("xtd200", "image_to_text_R@1"),
    "Dollar Street top-1": ("dollar_street", "top1"),
    "Dollar Street top-5": ("dollar_street", "top5"),
    "GLDv2": ("gldv2", "top1"),
    "GeoDE": ("geode", "top1"),
}
"""Column of the paper -> (name of the set in a suite, metric); :data:`MEANS` has the columns of several sets."""

_TABLE_3 = tuple(COLUMNS)[:6]
_TABLE_1 = ("ImageNet", "SLIP-26", *tuple(COLUMNS)[1:12])
_TABLE_4 = tuple(COLUMNS)[12:]


def _row(columns: tuple[str, ...], *values: float) -> dict[str, float]:
    return dict(zip(columns, values, strict=True))


REPORTED: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "H/14": {
        "H/14 WW 29B": {
            **_row(_TABLE_1, 81.3, 74.5, 50.2, 51.5, 64.3, 61.5, 57.4, 50.9, 53.2, 86.1, 87.5, 48.9, 51.0),
            **_row(_TABLE_4, 37.9, 64.0, 69.0, 93.4),
        },
        "H/14 WW 13B": {
            **_row(_TABLE_1, 79.5, 71.1, 47.1, 49.6, 62.6, 59.9, 56.0, 49.1, 52.1, 85.2, 87.1, 47.0, 49.7),
            **_row(_TABLE_4, 37.2, 63.7, 65.8, 94.3),
        },
        "XLM-CLIP H/14": _row(_TABLE_1, 77.0, 69.4, 34.0, 50.4, 60.5, 56.1, 48.2, 43.2, 46.2, 87.1, 88.4, 42.5, 45.2),
    },
    "SO400M/16": {
        "mSigLIP SO400M": _row(_TABLE_1, 80.6, 69.1, 46.4, 50.0, 62.8, 56.8, 49.8, 39.9, 42.0, 85.6, 88.8, 42.5, 45.2),
        "SigLIP 2 SO400M": _row(_TABLE_1, 83.2, 73.7, 40.8, 48.2, 59.7, 58.5, 49.0, 36.6, 40.3, 86.1, 87.6, 40.3, 44.5),
    },
    "B/16": {
        "mSigLIP B/16": _row(_TABLE_1, 75.1, 63.8, 40.2, 44.5, 56.6, 51.8, 45.7, 34.0, 36.0, 80.8, 84.0, 37.8, 40.6),
    },
    "L/14": {
        "L/14 WW 29B": _row(_TABLE_1, 78.8, 67.2, 44.2, 45.3, 58.2, 59.2, 55.1, 41.9, 45.8, 82.8, 85.0, 41.9, 44.8),
    },
    "B/32": {
        "B/32 WW 1.0x, XLM-V": _row(_TABLE_3, 64.7, 32.7, 40.0, 51.4, 50.4, 47.4),
        "B/32 WW 1.0x, mT5": _row(_TABLE_3, 64.7, 31.5, 38.1, 50.0, 50.3, 46.6),
    },
}
"""By size, then row, then column."""

SIZES = {(1280, 14): "H/14", (1152, 16): "SO400M/16", (1024, 14): "L/14", (768, 16): "B/16", (768, 32): "B/32"}
"""Vision width and patch -> size."""


def reported(width: int | None, patch_size: int | None) -> Mapping[str, Mapping[str, float]]:
    """The paper's rows for a vision tower of this width and patch size; empty if it reports none."""
    return {} if width is None or patch_size is None else REPORTED.get(SIZES.get((width, patch_size), ""), {})


def columns_of(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The paper's columns for which a suite's results (``suite.to_json``) have a number, in per cent."""
    numbers = {name: entry.get("mean", {}) for name, entry in sets.items()}
    found = {
        column: 100 * numbers[where][metric]
        for column, (where, metric) in COLUMNS.items()
        if metric in numbers.get(where, {})
    }
    for column, parts in MEANS.items():
        if not _missing(parts, sets):
            found[column] = 100 * fmean(fmean(numbers[w][metric] for metric in _metrics(m)) for w, m in parts.items())
    return {column: found[column] for column in ("ImageNet", *MEANS, *COLUMNS) if column in found}


def why_no_mean(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why a suite that names all sets of one of :data:`MEANS` does not have that mean; empty for any other suite."""
    lines = []
    for column, parts in MEANS.items():
        missing = _missing(parts, sets)
        if missing and parts.keys() <= sets.keys():
            names = ", ".join(missing)
            lines.append(f"{column} has no mean: {len(missing)} of its {len(parts)} sets have no number ({names}).")
    return lines


def _missing(parts: Mapping[str, str | tuple[str, ...]], sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [name for name, of in parts.items() if not set(_metrics(of)) <= sets.get(name, {}).get("mean", {}).keys()]


def _metrics(of: str | tuple[str, ...]) -> tuple[str, ...]:
    return (of,) if isinstance(of, str) else of
