"""Hashing the images of a shard: pHash codes of each, and projections of its features if there is an encoder."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from mc2_hpc.curation.copies.codes import view_codes
from mc2_hpc.curation.copies.features import NUM_PROJECTIONS, Encoder, load_encoder, projections_of
from mc2_hpc.curation.copies.hashes import PHASH, PROJECTIONS, HashStats, write_codes, write_images
from mc2_hpc.curation.copies.linking import Entries
from mc2_hpc.curation.pool.captions import PoolShard
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.drops import Dropped
from mc2_hpc.images import image_size, load_rgb, open_image
from mc2_hpc.jobs import REDO, stats_path
from mc2_hpc.jobs.named import Named, from_plain, to_plain
from mc2_hpc.reading.json_file import read_json
from mc2_hpc.samples import Sample
from mc2_hpc.storage import fingerprint, write_array, write_json

_BATCH, _BATCH_PIXELS = 32, 1 << 26
"""Images that are encoded together: so many, or fewer if they are large."""


def samples_with_images(index: TarIndex) -> list[Sample]:
    """The samples of a tar that have an image, in order."""
    return [sample for sample in index.listing.samples.values() if sample.image is not None]


def text_of(key: str) -> str:
    """A key as it is recorded: what is not UTF-8 is replaced."""
    return key.encode("utf-8", "replace").decode()


@lru_cache(maxsize=1)
def _loaded(named: str) -> Encoder:
    return load_encoder(from_plain(json.loads(named), Named, "encoder"))


def encoder_of(named: Named | None) -> Encoder | None:
    """The encoder, loaded once per process."""
    return _loaded(json.dumps(to_plain(named), sort_keys=True)) if named is not None else None


class FeatureBatches:
    """Collects images and encodes them in batches, always the same ones for the same images.

    Without an encoder, it does nothing and there are no projections.
    """

    def __init__(self, encoder: Encoder | None) -> None:
        self._encoder = encoder
        self._waiting: list[Image.Image] = []
        self._done: list[npt.NDArray[np.int32]] = [np.zeros((0, NUM_PROJECTIONS), np.int32)]

    def add(self, data: bytes) -> None:
        """Add the next encoded image.

        Raises:
            Dropped: the image cannot be decoded; it is not added.
        """
        if self._encoder is None:
            return
        self._waiting.append(load_rgb(open_image(data)))
        pixels = sum(one.width * one.height for one in self._waiting)
        if len(self._waiting) == _BATCH or pixels >= _BATCH_PIXELS:
            self._encode()

    def projections(self) -> npt.NDArray[np.int32]:
        """Projections of all images so far, ``(n, NUM_PROJECTIONS)``."""
        if self._waiting:
            self._encode()
        return np.concatenate(self._done)

    def _encode(self) -> None:
        assert self._encoder is not None
        self._done.append(projections_of(self._encoder, self._waiting))
        self._waiting = []


@dataclass(frozen=True)
class HashShard:
    """Hashes the images of one shard."""

    out: Path
    encoder: Named | None

    def is_current(self, shard: str, value: PoolShard) -> bool:
        """Whether the shard was hashed as it is now."""
        return read_json(stats_path(self.out, shard), HashStats, cure=REDO).made_of == fingerprint((value.images,))

    def __call__(self, name: str, shard: PoolShard) -> None:
        made_of = fingerprint((shard.images,))
        rows: list[tuple[str, int, int, str | None]] = []
        codes: list[Entries] = []
        features = FeatureBatches(encoder_of(self.encoder))
        for sample, data in _images(shard):
            key = text_of(sample.key)
            try:
                entries = view_codes(data)
                width, height = image_size(data)
                features.add(data)
            except Dropped as dropped:
                rows.append((key, 0, 0, str(dropped.reason)))
                continue
            entries["image"] = len(rows)
            codes.append(entries)
            rows.append((key, width * height, len(data), None))
        columns = zip(*rows, strict=True) if rows else ((), (), (), ())
        table = pa.table(dict(zip(("key", "pixels", "bytes", "reason"), map(list, columns), strict=True)))
        write_codes(self.out, name, PHASH, codes)
        if self.encoder is not None:
            write_array(self.out / PROJECTIONS.format(shard=name), features.projections())
        write_images(self.out, name, table)
        write_json(stats_path(self.out, name), {"images_read": len(rows), "made_of": made_of})


def _images(shard: PoolShard) -> Iterator[tuple[Sample, bytes]]:
    assert shard.images is not None
    with TarIndex(shard.images) as index:
        for sample in samples_with_images(index):
            assert sample.image is not None
            yield sample, index.read(sample.image)
