"""What became of each key of a shard, and the images so far: on disk, so that a killed run continues inside a shard.

``<shard>.images`` has the images one after another, in the order in which they arrived; ``<shard>.ledger`` begins with
a digest of what is fetched and has one record per key that is done. The record is written after the image. Both are
removed once the shard's tar is written, in the order of the keys.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from mc2_hpc.curation.fetching.stored import FORMATS, StoredImage
from mc2_hpc.drops import Drop

PENDING, IMAGE = 0, 1
_REASONS = tuple(Drop)
_FIRST_REASON = 2
"""A record's ``outcome`` is PENDING, IMAGE, or the number of a reason from here on."""
_DIGEST = 32
_RECORD = np.dtype(
    [
        *(("row", "<u4"), ("outcome", "u1"), ("format", "u1"), ("width", "<u4"), ("height", "<u4")),
        *(("offset", "<u8"), ("size", "<u4"), ("sha256", "u1", 32)),
    ]
)


class Ledger:
    """Outcomes by row of ``keys``: ``with Ledger(...) as ledger``.

    Args:
        folder: where the files are, or will be.
        keys: distinct, sorted.
        sources: the address of each.
    """

    def __init__(self, folder: Path, shard: str, keys: pa.Array, sources: pa.Array) -> None:
        self._images_path = folder / f"{shard}.images"
        self._ledger_path = folder / f"{shard}.ledger"
        self._keys = keys
        self._digest = _digest(keys, sources)
        self._outcomes = np.zeros(len(keys), _RECORD)

    def __enter__(self) -> "Ledger":
        self._images_path.parent.mkdir(parents=True, exist_ok=True)
        # "a" creates them; then read and write anywhere.
        for path in (self._images_path, self._ledger_path):
            path.open("ab").close()
        self._images = self._images_path.open("r+b", buffering=0)
        self._ledger = self._ledger_path.open("r+b", buffering=0)
        self._read()
        self._end = self._images.seek(0, os.SEEK_END)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._images.close()
        self._ledger.close()

    def pending(self) -> list[int]:
        """Rows without an outcome, ascending."""
        return np.flatnonzero(self._outcomes["outcome"] == PENDING).tolist()

    def add_image(self, row: int, image: StoredImage) -> None:
        """Record that a row's image has arrived."""
        _write(self._images.fileno(), image.data)
        record = self._outcomes[row]
        record["outcome"], record["format"] = IMAGE, FORMATS.index(image.extension)
        record["width"], record["height"] = image.width, image.height
        record["offset"], record["size"] = self._end, len(image.data)
        record["sha256"] = np.frombuffer(hashlib.sha256(image.data).digest(), np.uint8)
        self._end += len(image.data)
        self._add(row)

    def add_drop(self, row: int, reason: Drop) -> None:
        """Record why a row has no image."""
        self._outcomes[row]["outcome"] = _FIRST_REASON + _REASONS.index(reason)
        self._add(row)

    def images(self) -> Iterator[tuple[str, bytes]]:
        """File names and contents, in the order of the keys."""
        for row in np.flatnonzero(self._outcomes["outcome"] == IMAGE).tolist():
            record = self._outcomes[row]
            name = f"{self._keys[row].as_py()}.{FORMATS[record['format']]}"
            yield name, os.pread(self._images.fileno(), int(record["size"]), int(record["offset"]))

    def table(self) -> pa.Table:
        """One row per key: ``key``, ``status`` (``image`` or ``dropped``), ``reason`` (null for an image), ``format``,
        ``width``, ``height``, ``size`` in bytes and ``sha256`` in hex of the image as stored (null without one)."""
        done = self._outcomes
        missing = done["outcome"] != IMAGE
        reasons = pa.array([None, None, *map(str, _REASONS)], pa.string())
        columns = {
            "key": self._keys.cast(pa.string()),
            "status": pa.array(np.where(missing, "dropped", "image").tolist(), pa.string()),
            "reason": reasons.take(pa.array(done["outcome"].astype(np.int64))),
            "format": pa.array(FORMATS).take(pa.array(done["format"].astype(np.int64), mask=missing)),
            "width": pa.array(done["width"], pa.uint32(), mask=missing),
            "height": pa.array(done["height"], pa.uint32(), mask=missing),
            "size": pa.array(done["size"], pa.uint32(), mask=missing),
            "sha256": pa.array(
                [None if m else s.tobytes().hex() for m, s in zip(missing, done["sha256"], strict=True)]
            ),
        }
        return pa.table({**columns, "sha256": columns["sha256"].cast(pa.string())})

    def remove(self) -> None:
        """Delete the files."""
        self._images_path.unlink(missing_ok=True)
        self._ledger_path.unlink(missing_ok=True)

    def _add(self, row: int) -> None:
        self._outcomes[row]["row"] = row
        _write(self._ledger.fileno(), self._outcomes[row].tobytes())

    def _read(self) -> None:
        """Take over the records of a killed run whose images are whole; start over if it fetched something else."""
        data = self._ledger.read()
        records = np.frombuffer(data[_DIGEST:][: (len(data) - _DIGEST) // _RECORD.itemsize * _RECORD.itemsize], _RECORD)
        if data[:_DIGEST] != self._digest:
            records = np.zeros(0, _RECORD)
            self._images.truncate(0)
        for record in records:
            if record["row"] < len(self._outcomes) and self._is_whole(record):
                self._outcomes[record["row"]] = record
        self._ledger.seek(0)
        _write(self._ledger.fileno(), self._digest + self._outcomes[self._outcomes["outcome"] != PENDING].tobytes())
        self._ledger.truncate()

    def _is_whole(self, record: np.void) -> bool:
        """Whether the record can be trusted: after a power failure the images may lack what the ledger has."""
        if record["outcome"] != IMAGE:
            return _FIRST_REASON <= record["outcome"] < _FIRST_REASON + len(_REASONS)
        if record["format"] >= len(FORMATS):
            return False
        data = os.pread(self._images.fileno(), int(record["size"]), int(record["offset"]))
        return hashlib.sha256(data).digest() == record["sha256"].tobytes()


def _digest(keys: pa.Array, sources: pa.Array) -> bytes:
    """Of what is fetched, and of the meaning of the records."""
    digest = hashlib.sha256(repr((_REASONS, FORMATS, _RECORD.descr)).encode())
    for column in (keys, sources):
        for value in column.to_pylist():
            digest.update(f"{value}\0".encode())
    return digest.digest()


def _write(descriptor: int, data: bytes) -> None:
    """Write all of ``data``; a write to a nearly full disk may be partial."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
