"""A run of a few seconds for the fault matrix and training tests: coloured squares, their captions, a tiny model."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.data.shards import Pair
from mc2_hpc.data.tokenizer import train_tokenizer

SAMPLES, PER_SHARD, LANES, BATCH = 512, 64, 8, 32
NUM_NEW = 16
"""New samples that a shard gets in the fault matrix's rows about changing shards."""
COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta", "white", "black"]
FARBEN = ["rotes", "hellgrünes", "blaues", "gelbes", "türkises", "violettes", "weißes", "schwarzes"]
"""The same in German, for a square."""


@dataclass(frozen=True)
class TinyPool:
    """A learnable plain pool of :data:`SAMPLES` good samples in 8 shards, and a tokenizer."""

    shards: Path
    tokenizer: Path
    vocab_size: int


def draw_pairs(count: int, *, prefix: str = "") -> Iterator[Pair]:
    """Pairs whose keys are ``prefix`` and six digits."""
    for number in range(count):
        inside, outside = COLOURS[number % 8], COLOURS[number // 8 % 8]
        image = Image.new("RGB", (40, 40), outside)
        image.paste(inside, (8 + number % 5, 8 + number % 7, 32, 32))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=90)
        text = f"a {inside} square on {outside} ground, number {number % 3}"
        yield Pair(key=f"{prefix}{number:06d}", image=data.getvalue(), text=text, lang="en")


def write_caption_set(folder: Path, squares: Mapping[str, str]) -> None:
    """Sixteen images with captions for ``caption_lines``.

    Args:
        squares: languages, and their word for squares.
    """
    pairs = list(draw_pairs(16))
    (folder / "images").mkdir(parents=True)
    names = [f"{pair.key}.jpg" for pair in pairs]
    for name, pair in zip(names, pairs, strict=True):
        (folder / "images" / name).write_bytes(pair.image)
    (folder / "filenames.txt").write_text("\n".join(names))
    for lang, word in squares.items():
        (folder / f"{lang}.txt").write_text("\n".join(pair.text.replace("square", word) for pair in pairs))


def write_pool(folder: Path) -> TinyPool:
    """Make the pool in ``folder``."""
    pairs = list(draw_pairs(SAMPLES))
    pack_pairs(pairs, folder / "shards", pairs_per_shard=PER_SHARD)
    tokenizer = train_tokenizer((pair.text for pair in pairs), folder / "sp.model", vocab_size=64, style="xlmv")
    return TinyPool(folder / "shards", folder / "sp.model", tokenizer.vocab_size)


def write_config(path: Path, pool: TinyPool, **values: Any) -> Path:
    """Write the YAML of an fp32 run on ``pool`` with extra top-level ``values``; returns ``path``."""
    config = {
        "global_batch": BATCH,
        "precision": "fp32",
        "model": {
            "preset": "ViT-S-16-worldwide",
            "embed_dim": 32,
            "vision": {"image_size": 32, "width": 64, "layers": 2, "head_width": 32},
            "text": {"vocab_size": pool.vocab_size, "context_length": 24, "width": 48, "heads": 3, "layers": 2},
        },
        "data": {"train": str(pool.shards), "tokenizer": str(pool.tokenizer), "lanes": LANES, "workers": 0},
        "optim": {"lr": 1e-3, "warmup": 4},
        "zero": {"stage": 1},
        **values,
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
