"""The quickstart's raw material: a worldwide pool of pictures and candidate captions, and a held-out set.

    folder/pool/pool-00007.tar          <key>.jpg
    folder/pool/pool-00007.parquet      key, text, lang, source: one row a candidate caption
    folder/heldout/heldout-00000.tar    <key>.jpg, other writers' digits, every number equally often
    folder/heldout/heldout-00000.parquet  key, text, lang, source, number: one row a language

As on the web, a few numbers and a few languages make up most of the pool, English most of all, an image may have
several candidate captions, and some captions say nothing. Every draw comes from (seed, shard): the same seed writes the
same bytes.
"""

import io
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.quickstart.captions import LANGUAGES, NUMBERS, draw_caption, draw_noise, number_names
from mc2_hpc.quickstart.pictures import HandwrittenDigits, draw_number, load_handwriting
from mc2_hpc.storage import atomic_path

_CAPTION_COUNTS = (0.35, 0.35, 0.2, 0.1)
"""Chance that a picture has 1, 2, 3 or 4 candidate captions."""
_NOISE_SHARE = 0.12
"""Chance that a candidate caption is noise."""
_LANGUAGE_EXPONENT = 0.85
_NUMBER_EXPONENT = {"en": 1.15}
_OTHER_NUMBER_EXPONENT = 0.6
"""Zipf exponents. English repeats its most frequent numbers more than the others do, so balancing lowers its share."""


@dataclass(frozen=True)
class PoolSummary:
    """What :func:`make_pool` wrote."""

    pool: Path
    heldout: Path
    images: int
    captions: int
    heldout_images: int


def make_pool(
    folder: str | Path,
    *,
    images: int = 16_000,
    shards: int = 16,
    heldout_per_number: int = 10,
    seed: int = 0,
    progress: Callable[[int], None] = lambda images: None,
) -> PoolSummary:
    """Write the pool and the held-out set under ``folder``; ``progress`` is told the pictures of a shard."""
    folder = Path(folder)
    names = number_names()
    training, heldout = load_handwriting()
    captions = 0
    for shard in range(shards):
        count = images * (shard + 1) // shards - images * shard // shards
        rng = np.random.default_rng([seed, 0, shard])
        captions += _write_pool_shard(folder / "pool" / f"pool-{shard:05d}", shard, count, training, names, rng)
        progress(count)
    rng = np.random.default_rng([seed, 1])
    _write_heldout(folder / "heldout" / "heldout-00000", heldout_per_number, heldout, names, rng)
    progress(heldout_per_number * len(NUMBERS))
    return PoolSummary(folder / "pool", folder / "heldout", images, captions, heldout_per_number * len(NUMBERS))


def heldout_place(key: str) -> tuple[int, int]:
    """(fold, number) of a held-out picture's key; every fold has one picture of every number."""
    fold, number = key.removeprefix("h").split("-")
    return int(fold), int(number)


def zipf(count: int, exponent: float) -> npt.NDArray[np.float64]:
    """Probabilities of ranks 0..count-1: proportional to ``(rank + 1) ** -exponent``."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def _write_pool_shard(
    stem: Path, shard: int, count: int, digits: HandwrittenDigits, names: dict[str, list[str]], rng: np.random.Generator
) -> int:
    language_weights = zipf(len(LANGUAGES), _LANGUAGE_EXPONENT)
    number_weights = {
        lang: zipf(len(NUMBERS), _NUMBER_EXPONENT.get(lang, _OTHER_NUMBER_EXPONENT)) for lang in LANGUAGES
    }
    pictures, rows = [], []
    for index in range(count):
        key = f"{shard:03d}-{index:06d}"
        first = LANGUAGES[rng.choice(len(LANGUAGES), p=language_weights)]
        number = int(rng.choice(len(NUMBERS), p=number_weights[first]))
        pictures.append((key, draw_number(number, digits, rng)))
        num_captions = 1 + int(rng.choice(len(_CAPTION_COUNTS), p=_CAPTION_COUNTS))
        others = rng.choice(len(LANGUAGES), size=num_captions - 1, p=language_weights)
        for lang in (first, *(LANGUAGES[other] for other in others)):
            if rng.random() < _NOISE_SHARE:
                lang, text = draw_noise(rng)
            else:
                text = draw_caption(lang, names[lang][number], rng)
            rows.append({"key": key, "text": text, "lang": lang, "source": "alt"})
    _write_tar(stem.with_suffix(".tar"), pictures)
    _write_rows(stem.with_suffix(".parquet"), rows)
    return len(rows)


def _write_heldout(
    stem: Path, per_number: int, digits: HandwrittenDigits, names: dict[str, list[str]], rng: np.random.Generator
) -> None:
    pictures, rows = [], []
    for fold in range(per_number):
        for number in NUMBERS:
            key = f"h{fold:02d}-{number:02d}"
            pictures.append((key, draw_number(number, digits, rng)))
            for lang in LANGUAGES:
                text = draw_caption(lang, names[lang][number], rng)
                rows.append({"key": key, "text": text, "lang": lang, "source": "heldout", "number": number})
    _write_tar(stem.with_suffix(".tar"), pictures)
    _write_rows(stem.with_suffix(".parquet"), rows)


def _write_tar(path: Path, pictures: Iterable[tuple[str, bytes]]) -> None:
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, jpeg in pictures:
            header = tarfile.TarInfo(f"{key}.jpg")  # time, owner and group 0: the same pictures give the same bytes
            header.size = len(jpeg)
            tar.addfile(header, io.BytesIO(jpeg))


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
