"""Generated pairs in place of a run's own data: for tuning before the data is there, or without its storage.

Images are JPEGs of a web image's size and detail, captions a few common words. Shards lie beside the trials, so nothing
is learned about the storage of the real ones.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from mc2_hpc.config import RunConfig
from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.data.shards import Pair
from mc2_hpc.data.tokenizer import train_tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.storage import is_complete, mark_complete, remove_folder
from mc2_hpc.tuning.space import Settings

_WIDTH, _HEIGHT, _QUALITY = 640, 480, 90
_DIFFERENT = 64
"""Images; each occurs under several keys, because decoding takes as long the second time."""
_MOST_PAIRS = 8192
_WORDS = (
    "red blue green old new small large white black wooden house street river mountain cat dog horse bird tree garden "
    "car train bridge market table chair book window door kitchen beach boat sky cloud sun snow winter summer woman "
    "man child family city village photo of the a in on with near under two three people walking sitting standing"
).split()
_FEWEST, _MOST = 6, 18
"""Words of a caption."""
_VOCABULARY = 400
"""Ids of the tokenizer; the model's table may have more rows."""


def synthetic_data(config: RunConfig, folder: Path, *, ranks: int) -> Settings:
    """Write shards and, if the config names no tokenizer that exists, a tokenizer; returns the settings that use them.

    What is complete is kept.

    Raises:
        UserError: the run reads stored features, which nothing here generates.
    """
    if config.data.features is not None:
        raise UserError("--synthetic generates images, and the config reads data.features: set data.features=null")
    if config.distill is not None and config.distill.features is not None:
        raise UserError("--synthetic generates images, and the config reads distill.features: set distill=null")
    number = max(config.data.lanes, min(config.global_batch, _MOST_PAIRS))
    rows = min(_VOCABULARY, config.model.text.vocab_size or _VOCABULARY)
    home = folder / f"{number}-{ranks}-{config.data.tokenizer_style}-{rows}"
    if not is_complete(home):
        remove_folder(home)
        pack_pairs(_pairs(number), home / "shards", pairs_per_shard=max(8, min(1000, number // (8 * ranks))))
        rng = np.random.default_rng(1)
        captions = [_caption(rng) for _ in range(2000)]
        train_tokenizer(captions, home / "tokenizer.model", vocab_size=rows, style=config.data.tokenizer_style)
        mark_complete(home)
    found = {"data.train": str(home / "shards"), "data.balance": None, "data.takedown": None}
    named = config.data.tokenizer
    if named and Path(named).expanduser().is_file():
        return found
    if not named and config.model.init_from is not None:
        return found  # the initial model has one
    return {**found, "data.tokenizer": str(home / "tokenizer.model")}


def _pairs(number: int) -> Iterator[Pair]:
    rng = np.random.default_rng(0)
    images = [_jpeg(rng) for _ in range(min(number, _DIFFERENT))]
    for each in range(number):
        yield Pair(key=f"{each:06d}", image=images[each % len(images)], text=_caption(rng), lang="en")


def _jpeg(rng: np.random.Generator) -> bytes:
    """Blurred colours with grain."""
    coarse = Image.fromarray(rng.integers(0, 256, (_HEIGHT // 40, _WIDTH // 40, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC), np.float32)
    grainy = smooth + rng.normal(0, 6, (_HEIGHT, _WIDTH, 1))
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(np.clip(grainy, 0, 255).astype(np.uint8)), quality=_QUALITY, colorsubsampling="420"
    )


def _caption(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(_WORDS, rng.integers(_FEWEST, _MOST)))
