"""What a suite found, written down: ``results.json``, a Markdown table beside the paper's numbers, ``report.html``."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mc2_hpc.evaluation.encoder import Encoder, PictureFeatures
from mc2_hpc.evaluation.nearest import nearest
from mc2_hpc.evaluation.paper import columns_of, why_no_slip_26
from mc2_hpc.evaluation.pictures import Pictures
from mc2_hpc.evaluation.suite import SetResult
from mc2_hpc.evaluation.tasks import Retrieval
from mc2_hpc.pages import data_uri, write_page

_EXAMPLES_A_SET, _HITS, _THUMBNAIL = 6, 5, 128
_LEADING = ("top1", "mean_per_class_top1", "text_to_image_R@1", "LOCAL", "5_shot")
"""The metric that languages are ordered by, the first of these that a set has."""


def markdown(name: str, sets: Mapping[str, Mapping[str, Any]], paper: Mapping[str, Mapping[str, float]]) -> str:
    """A table of the paper's columns with a row for ``name`` and one for each of the paper's; then every other number.

    Args:
        sets: what ``suite.to_json`` made.
        paper: rows of ``paper.reported``.
    """
    found = columns_of(sets)
    lines = []
    if found:
        lines += _table(
            ["model", *found], [[name, *_cells(found, found)]] + [[r, *_cells(v, found)] for r, v in paper.items()]
        )
        lines += ["", "In per cent. Rows below the first are the paper's (arXiv 2507.22062); a dash: not reported.", ""]
    if why := why_no_slip_26(sets):
        lines += [why, ""]
    rows = []
    for where, entry in sets.items():
        if "error" in entry:
            rows.append([where, "not scored", entry["error"], ""])
            continue
        skipped = ", ".join(f"{reason} {count}" for reason, count in entry["skipped"].items())
        for metric, value in entry["mean"].items():
            rows.append([where, metric, f"{100 * value:.1f}", skipped])
    lines += [*_table(["set", "metric", "per cent", "left out"], rows), ""]
    lines += _embedding_tables(sets)
    return "\n".join(lines)


def _embedding_tables(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of sets of pairs: alignment, uniformity, modality gap, gradient cosines, as means over languages."""
    rows = [
        [where, metric, f"{value:.3f}"]
        for where, entry in sets.items()
        for metric, value in entry.get("embedding_mean", {}).items()
    ]
    return [*_table(["set", "embeddings, mean over languages", "value"], rows), ""] if rows else []


def _cells(values: Mapping[str, float], columns: Mapping[str, float]) -> list[str]:
    return [f"{values[column]:.1f}" if column in values else "-" for column in columns]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    return [f"| {' | '.join(cells[0])} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in cells[1:])]


@dataclass(frozen=True)
class Hit:
    """An image shown for a caption."""

    thumbnail: str
    """A ``data:`` address."""
    own: bool
    """Whether the caption is this image's."""


@dataclass(frozen=True)
class Example:
    """One caption and the images closest to it, best first."""

    lang: str
    query: str
    hits: list[Hit]
    missed: str
    """Thumbnail of the caption's own image where it is not among the hits; else empty."""


def write_report(path: Path, name: str, results: Sequence[SetResult], encoder: Encoder) -> None:
    """One self-contained page: each set's numbers, languages from worst to best, and images found for captions.

    Collective: the captions shown are encoded. Only the first rank writes.
    """
    sections = [_section(result, encoder) for result in results]
    if encoder.writes:
        write_page(path, "mc2_hpc.evaluation", "report.html", {"name": name, "sections": sections})


def _section(result: SetResult, encoder: Encoder) -> dict[str, Any]:
    """What the page shows of one set."""
    scores = result.scores
    if scores is None or result.task is None or result.pictures is None:
        return {"name": result.name, "error": result.error}
    metric = leading_metric(next(iter(scores.groups.values())))
    worst_first = sorted(scores.groups.items(), key=lambda item: item[1].get(metric, 0.0))
    examples = []
    if isinstance(result.task, Retrieval):
        examples = _examples(result.task, result.pictures, scores.groups, encoder)
    return {
        "name": result.name,
        "error": "",
        "tiles": [(f"{100 * value:.1f}", f"{name}, %") for name, value in scores.mean.items()],
        "left_out": scores.skipped,
        "metric": metric,
        "groups": [(group, numbers.get(metric, 0.0), scores.counts[group]) for group, numbers in worst_first],
        "examples": examples,
    }


def leading_metric(numbers: Mapping[str, float]) -> str:
    """The metric of these by which groups are ordered."""
    return next((metric for metric in _LEADING if metric in numbers), next(iter(numbers)))


def _examples(
    task: Retrieval, features: PictureFeatures, groups: Mapping[str, Mapping[str, float]], encoder: Encoder
) -> list[Example]:
    """The five images closest to one caption of some languages, the worst ones first."""
    metric = leading_metric(next(iter(groups.values())))
    worst = sorted(groups, key=lambda lang: groups[lang][metric])[:_EXAMPLES_A_SET]
    queries = []
    for lang in worst:
        captions = task.languages[lang]
        shown = [i for i, owner in enumerate(captions.pictures) if features.usable[owner]]
        place = shown[len(shown) // 2]
        queries.append((lang, captions.texts[place], captions.pictures[place]))
    usable = torch.nonzero(features.usable).flatten()
    texts = encoder.texts([text for _, text, _ in queries])
    best = usable[nearest(texts, features.features[usable], min(_HITS, len(usable)))[1]]
    return [
        Example(
            lang=lang,
            query=text,
            hits=[Hit(_thumbnail(task.pictures, index), index == owner) for index in found],
            missed="" if owner in found else _thumbnail(task.pictures, owner),
        )
        for (lang, text, owner), found in zip(queries, best.tolist(), strict=True)
    ]


def _thumbnail(pictures: Pictures, index: int) -> str:
    """The image as a small JPEG in a ``data:`` address. It could be decoded before, so it can now."""
    image = Image.open(io.BytesIO(pictures.read(index))).convert("RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return data_uri(data.getvalue(), "image/jpeg")
