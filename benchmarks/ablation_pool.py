"""The data set of the ablations: CIFAR-10 images with captions in ten languages, metadata, and an evaluation suite.

    python -m benchmarks.ablation_pool SHARED_DATA OUT [--images 14000]

    OUT/pool/00000.tar, .parquet   images, and candidate captions: key, text, lang, source
    OUT/metadata/<lang>.json       the names of every class in that language
    OUT/test.parquet, suite.yaml   held-out images, and how ``mc2 eval`` scores them in every language

Names and templates are from Babel-ImageNet: a CIFAR class is called by the names of the ImageNet classes that belong to
it ("dog" by its breeds), the first being its common name. Like the web, the pool is uneven: English is its largest
language, and a few classes and a few of their names make up most of it, especially in English. An image has one to
three captions; some are uninformative, and some in other languages use the English name. Every draw follows from the
seed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.config import yaml_text
from mc2_hpc.data.packing import write_shard
from mc2_hpc.evaluation.sets.classes import babel_languages
from mc2_hpc.evaluation.tasks import ClassTexts
from mc2_hpc.metadata.files import write_entries
from mc2_hpc.quickstart.captions import NOISE
from mc2_hpc.quickstart.pool import zipf
from mc2_hpc.storage import atomic_path, write_text

# CIFAR-10's classes, most frequent in the pool first, and the ImageNet classes that belong to each.
IMAGENET_CLASSES = {
    "dog": (207, 258, 235, 151, 250),
    "automobile": (817, 468, 511, 627),
    "cat": (281, 284, 283, 285),
    "bird": (22, 94, 18, 17, 11),
    "ship": (510, 628, 484, 403),
    "airplane": (404, 895),
    "truck": (867, 555, 717, 864),
    "horse": (),
    "frog": (30, 31, 32),
    "deer": (),
}
# ImageNet has no deer, and its only horse is the sorrel.
HORSE_AND_DEER = {
    "en": ("horse", "deer"),
    "es": ("caballo", "ciervo"),
    "de": ("Pferd", "Hirsch"),
    "fr": ("cheval", "cerf"),
    "ru": ("лошадь", "олень"),
    "ja": ("ウマ", "シカ"),
    "zh": ("马", "鹿"),
    "ar": ("حصان", "أيل"),
    "ko": ("말", "사슴"),
    "he": ("סוס", "אייל"),
}
LANGUAGES = tuple(HORSE_AND_DEER)

_ENGLISH_SHARE = 0.44  # the recipe's
_LANGUAGE_EXPONENT = 0.5
_ENGLISH_EXPONENT, _EXPONENT = 1.2, 0.8
"""Zipf exponents for the classes and for the names within a class, in English and in other languages."""
_CAPTION_COUNTS = (0.5, 0.35, 0.15)
"""Chance that an image has 1, 2 or 3 captions."""
_NOISE_SHARE, _LOAN_SHARE = 0.1, 0.05
_TEMPLATES, _EVAL_TEMPLATES = 20, 5
"""Number of templates per language in the pool and in the evaluation."""

Names = dict[str, dict[str, list[str]]]
"""Language -> class -> its names, the common one first."""


def read_languages(shared: Path) -> tuple[Names, dict[str, list[str]]]:
    """Names and templates of :data:`LANGUAGES`."""
    babel = babel_languages(shared / "babel_imagenet-298.json", shared / "babel_imagenet_prompts.json")
    names = {lang: _class_names(lang, babel[lang]) for lang in LANGUAGES}
    forms = {lang: [form for form in babel[lang].templates if form.count("{}") == 1] for lang in LANGUAGES}
    return names, {lang: list(dict.fromkeys(own))[:_TEMPLATES] for lang, own in forms.items()}


def _class_names(lang: str, texts: ClassTexts) -> dict[str, list[str]]:
    by_number = dict(zip(texts.classes, texts.names, strict=True))
    names = {
        label: list(dict.fromkeys(by_number[number] for number in numbers if number in by_number))
        for label, numbers in IMAGENET_CLASSES.items()
    }
    return {**names, "horse": [HORSE_AND_DEER[lang][0]], "deer": [HORSE_AND_DEER[lang][1]]}


def make(shared: Path, out: Path, *, images: int = 14_000, test: int = 4_000, shards: int = 8, seed: int = 0) -> int:
    """Write everything under ``out``; returns the number of captions."""
    names, forms = read_languages(shared)
    for lang, of_class in names.items():
        entries = dict.fromkeys(name for own in of_class.values() for name in own)
        write_entries(out / "metadata" / f"{lang}.json", list(entries))
    table = pq.read_table(shared / "cifar10-train.parquet")
    by_class: dict[str, list[int]] = {label: [] for label in IMAGENET_CLASSES}
    for row, label in enumerate(table["label"].to_pylist()):
        by_class[label].append(row)
    captions = 0
    for shard in range(shards):
        rng = np.random.default_rng([seed, shard])
        rows, jpegs = [], []
        for number in range(images * shard // shards, images * (shard + 1) // shards):
            langs = rng.choice(LANGUAGES, size=1 + rng.choice(len(_CAPTION_COUNTS), p=_CAPTION_COUNTS), p=_shares())
            label = _draw(list(IMAGENET_CLASSES), str(langs[0]), rng)
            key = f"{number:06d}"
            jpegs.append((key, {"jpg": table["jpg"][by_class[label].pop()].as_py()}))
            for lang in langs.tolist():
                text = _draw_caption(lang, label, names, forms, rng)
                rows.append({"key": key, "text": text, "lang": lang, "source": "alt"})
        write_shard(out / "pool" / f"{shard:05d}.tar", jpegs)
        with atomic_path(out / "pool" / f"{shard:05d}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(rows), temporary)
        captions += len(rows)
    with atomic_path(out / "test.parquet") as temporary:
        pq.write_table(pq.read_table(shared / "cifar10-test.parquet").slice(0, test), temporary)
    write_text(out / "suite.yaml", yaml_text(suite(out, names, forms)))
    return captions


def suite(out: Path, names: Names, forms: dict[str, list[str]]) -> dict[str, Any]:
    """A suite of two sets: the classes by their common names, and by their rarest."""

    def entry(place: int) -> dict[str, Any]:
        chosen = {lang: [own[place] for own in of_class.values()] for lang, of_class in names.items()}
        templates = {lang: own[:_EVAL_TEMPLATES] for lang, own in forms.items()}
        options = {"classes": list(IMAGENET_CLASSES), "names": chosen, "templates": templates}
        return {"reader": "labelled_parquet", "path": "test.parquet", "options": options}

    return {"root": str(out), "sets": {"cifar10": entry(0), "cifar10_rare_names": entry(-1)}}


def _shares() -> np.ndarray:
    return np.concatenate([[_ENGLISH_SHARE], (1 - _ENGLISH_SHARE) * zipf(len(LANGUAGES) - 1, _LANGUAGE_EXPONENT)])


def _draw(choices: Sequence[str], lang: str, rng: np.random.Generator) -> str:
    exponent = _ENGLISH_EXPONENT if lang == "en" else _EXPONENT
    return choices[rng.choice(len(choices), p=zipf(len(choices), exponent))]


def _draw_caption(lang: str, label: str, names: Names, forms: dict[str, list[str]], rng: np.random.Generator) -> str:
    if rng.random() < _NOISE_SHARE:
        noise = [form for of, form in NOISE if of == lang] or ["IMG_{}.JPG"]
        return noise[rng.integers(len(noise))].format(rng.integers(1000, 9999))
    of = "en" if rng.random() < _LOAN_SHARE else lang
    return forms[lang][rng.integers(len(forms[lang]))].replace("{}", _draw(names[of][label], lang, rng))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path, help="folder with cifar10-{train,test}.parquet and Babel-ImageNet's files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=14_000)
    arguments = parser.parse_args()
    captions = make(arguments.shared, arguments.out, images=arguments.images)
    print(f"{arguments.out}: {arguments.images:,} images, {captions:,} captions")


if __name__ == "__main__":
    main()
