"""The quickstart's raw material: a worldwide pool of images and candidate captions, and a held-out set.

    folder/pool/pool-00007.tar          <key>.jpg
    folder/pool/pool-00007.parquet      key, text, lang, source: one row per candidate caption
    folder/heldout/heldout-00000.tar    <key>.jpg, other writers' digits: one shard per fold, one image per number
    folder/heldout/heldout-00000.parquet  key, text, lang, source, number: one row per language
    folder/heldout.parquet              key, label, jpg: all of these images with their numbers

As on the web, a few numbers and a few languages (above all English) make up most of the pool. An image may have several
candidate captions, and some captions say nothing about it. Every draw depends only on (seed, shard), so the same seed
gives the same bytes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mc2_hpc.quickstart.captions import LANGUAGES, NUMBERS, draw_caption, draw_noise, number_names
from mc2_hpc.quickstart.images import HandwrittenDigits, draw_number, load_handwriting
from mc2_hpc.storage import atomic_path, write_table
from mc2_hpc.tar import write_tar

_CAPTION_COUNTS = (0.35, 0.35, 0.2, 0.1)
"""Probability that an image has 1, 2, 3 or 4 candidate captions."""
_NOISE_SHARE = 0.12
"""Probability that a candidate caption is noise."""
_ENGLISH_SHARE = 0.3
_LANGUAGE_EXPONENT = 0.4
"""Zipf exponent of the other languages' frequencies."""
_ENGLISH_NUMBER_EXPONENT = 1.15
_NUMBER_EXPONENT = 0.6
"""Zipf exponents of the numbers' frequencies. English has a heavier head, so balancing removes more of it."""


@dataclass(frozen=True, kw_only=True)
class PoolSummary:
    """How much :func:`make_pool` wrote."""

    images: int
    captions: int
    heldout_images: int


def make_pool(
    folder: str | Path,
    *,
    images: int = 20_000,
    shards: int = 20,
    heldout_per_number: int = 10,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PoolSummary:
    """Write the pool and the held-out set under ``folder``.

    Args:
        images: number of images in the pool.
        heldout_per_number: held-out images per number.
        progress: called with (images made, total images).
    """
    folder = Path(folder)
    names = number_names()
    training, heldout = load_handwriting()
    num_heldout = heldout_per_number * len(NUMBERS)
    captions = done = 0
    for shard in range(shards):
        count = images * (shard + 1) // shards - images * shard // shards
        rng = np.random.default_rng([seed, 0, shard])
        captions += _write_pool_shard(folder / "pool" / f"pool-{shard:05d}", shard, count, training, names, rng)
        done += count
        progress(done, images + num_heldout)
    rng = np.random.default_rng([seed, 1])
    _write_heldout(folder, heldout_per_number, heldout, names, rng)
    progress(images + num_heldout, images + num_heldout)
    return PoolSummary(images=images, captions=captions, heldout_images=num_heldout)


def heldout_place(key: str) -> tuple[int, int]:
    """(fold, number) of a held-out image's key; every fold has one image of every number."""
    fold, number = key.removeprefix("h").split("-")
    return int(fold), int(number)


def zipf(count: int, exponent: float) -> npt.NDArray[np.float64]:
    """Probabilities of ranks 0..count-1: proportional to ``(rank + 1) ** -exponent``."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def _write_pool_shard(
    stem: Path, shard: int, count: int, digits: HandwrittenDigits, names: dict[str, list[str]], rng: np.random.Generator
) -> int:
    others = zipf(len(LANGUAGES) - 1, _LANGUAGE_EXPONENT)
    language_weights = np.concatenate([[_ENGLISH_SHARE], (1 - _ENGLISH_SHARE) * others])
    num_captions = 1 + rng.choice(len(_CAPTION_COUNTS), size=count, p=_CAPTION_COUNTS)
    languages = rng.choice(LANGUAGES, size=(count, len(_CAPTION_COUNTS)), p=language_weights)
    # The number is drawn from the distribution of the image's first language.
    numbers = np.empty(count, np.int64)
    for lang in LANGUAGES:
        own = languages[:, 0] == lang
        exponent = _ENGLISH_NUMBER_EXPONENT if lang == "en" else _NUMBER_EXPONENT
        numbers[own] = rng.choice(len(NUMBERS), size=int(own.sum()), p=zipf(len(NUMBERS), exponent))
    images: list[tuple[str, bytes]] = []
    rows: list[dict[str, object]] = []
    for index, number in enumerate(numbers.tolist()):
        key = f"{shard:03d}-{index:06d}"
        images.append((key, draw_number(number, digits, rng)))
        for lang in languages[index, : num_captions[index]].tolist():
            if rng.random() < _NOISE_SHARE:
                lang, text = draw_noise(rng)
            else:
                text = draw_caption(lang, names[lang][number], rng)
            rows.append({"key": key, "text": text, "lang": lang, "source": "alt"})
    _write_images(stem.with_suffix(".tar"), images)
    write_table(stem.with_suffix(".parquet"), pa.Table.from_pylist(rows))
    return len(rows)


def _write_heldout(
    folder: Path, per_number: int, digits: HandwrittenDigits, names: dict[str, list[str]], rng: np.random.Generator
) -> None:
    labelled: list[dict[str, object]] = []
    for fold in range(per_number):
        images: list[tuple[str, bytes]] = []
        rows: list[dict[str, object]] = []
        for number in NUMBERS:
            key = f"h{fold:02d}-{number:02d}"
            images.append((key, draw_number(number, digits, rng)))
            for lang in LANGUAGES:
                text = draw_caption(lang, names[lang][number], rng)
                rows.append({"key": key, "text": text, "lang": lang, "source": "heldout", "number": number})
        stem = folder / "heldout" / f"heldout-{fold:05d}"
        _write_images(stem.with_suffix(".tar"), images)
        write_table(stem.with_suffix(".parquet"), pa.Table.from_pylist(rows))
        labelled += [
            {"key": key, "label": str(number), "jpg": jpeg} for (key, jpeg), number in zip(images, NUMBERS, strict=True)
        ]
    write_table(folder / "heldout.parquet", pa.Table.from_pylist(labelled))


def _write_images(path: Path, images: Iterable[tuple[str, bytes]]) -> None:
    with atomic_path(path) as temporary:
        write_tar(temporary, ((f"{key}.jpg", jpeg) for key, jpeg in images))
