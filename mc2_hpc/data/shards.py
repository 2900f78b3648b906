"""Training shards as tables of image-text pairs: curated ones and plain WebDataset ones behind one class each.

A **curated** shard is ``<shard>.tar`` of ``<key>.jpg`` with ``<shard>.parquet`` beside it: columns ``key`` and
``text``, perhaps ``lang`` and ``entries``; several rows may share a key. A **plain** shard is any other WebDataset tar:
files of one key up to the first dot of their names, an image and a caption (``.txt``, or ``caption`` or ``text`` of
a ``.json``, which may also have ``lang``). The Parquet file that img2dataset leaves beside its tars has no ``text``
column, so those shards are plain.
"""

import errno
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mc2_hpc.balancing.selection import select
from mc2_hpc.data.crop import Encoded
from mc2_hpc.data.index import ShardIndex, cache_folder, open_index
from mc2_hpc.data.skips import ShardError, SkipSample
from mc2_hpc.draws import hash_keys
from mc2_hpc.errors import UserError
from mc2_hpc.tar import ByteSource, LocalFile

if TYPE_CHECKING:
    import pyarrow

_PLACES = struct.Struct("=8q")
"""A row of :attr:`ShardIndex.places`."""

Probabilities = Mapping[str, npt.NDArray[np.float32]]
"""Keep probability of each metadata entry, by language."""


class Pair(NamedTuple):
    """One image, still encoded, and one of its captions; ``lang`` is empty where nobody knows it."""

    key: str
    image: Encoded
    text: str
    lang: str = ""


@dataclass(frozen=True)
class CaptionedImage:
    """One image, still encoded, and all of its captions."""

    key: str
    image: Encoded
    texts: list[str]
    langs: list[str]


class Shard(Protocol):
    """What the stream and the evaluation need of a shard of either kind. A *row* is one caption of one image."""

    name: str
    """For messages: its path or address."""
    unsafe_names: int
    """Members left out because their names lead out of the shard."""
    changed: bool
    """Whether it was rewritten since it was last listed."""
    num_keys: int

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """Hash of each row's key, for the draws of the data path."""
        ...

    def select_rows(self, probs: Probabilities | None, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The rows an epoch trains on: one per image, or none where balancing drops it.

        Raises UserError where ``probs`` do not fit the shard.
        """
        ...

    def read(self, row: int) -> Pair:
        """Raises SkipSample."""
        ...

    def read_image(self, index: int) -> CaptionedImage:
        """Image ``index`` of ``num_keys``. Raises SkipSample."""
        ...


def open_shard(path: Path, *, name: str | None = None, cache: Path | None = None, pin: object = None) -> Shard:
    """Open a shard of either kind and list what it holds, or read its kept index.

    Args:
        name: for messages; None is the path.
        cache: folder for indexes of shards whose own folder cannot be written; None is the user's cache folder.
        pin: kept as long as the shard is.

    Raises:
        ShardError: missing, empty, damaged or cut off.
    """
    try:
        source = LocalFile(path, pin)
        table = _read_pairs_table(path.with_suffix(".parquet"))
        index = open_index(path, source, curated=table is not None, cache=cache or cache_folder())
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the shard's
            raise UserError(
                f"{path}: {error.strerror}: raise the limit (`ulimit -n`), or set data.lanes lower"
            ) from None
        raise ShardError(error.strerror or str(error)) from None
    if table is None:
        return PlainShard(name or str(path), source, index)
    return CuratedShard(name or str(path), source, index, table)


class PlainShard:
    """A WebDataset tar: every image has one caption, so rows and images are the same."""

    def __init__(self, name: str, source: ByteSource, index: ShardIndex) -> None:
        if not index.keys:
            raise ShardError("holds neither images nor captions")
        self.name = name
        self.unsafe_names = index.unsafe_names
        self.changed = index.changed
        self.num_keys = len(index.keys)
        self._source = source
        self._keys = index.keys
        self._hashes = index.hashes
        # Numbers out of packed bytes: quicker than out of an array, and smaller than lists.
        self._places = index.places.tobytes()

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        return self._hashes

    def select_rows(self, probs: Probabilities | None, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        if probs is not None:
            raise UserError(
                f"{self.name}: data.balance is set, but this is no curated shard (no .parquet with key, text, lang and "
                f"entries beside it): curate the data first, or unset data.balance"
            )
        return np.arange(self.num_keys)

    def read(self, row: int) -> Pair:
        places = _PLACES.unpack_from(self._places, row * _PLACES.size)
        begin, size, image, image_end, text, text_end, more, more_end = places
        if image < 0:
            raise SkipSample("image_missing")
        try:
            if size >= 0:
                data = self._source.read(begin, size)
            else:
                data, (image, image_end, text, text_end, more, more_end) = self._read_apart(places)
        except OSError as error:
            raise SkipSample("read_error", str(error)) from None
        raw = data[text:text_end] if text >= 0 else None
        if more < 0 and raw is not None:
            caption, lang = _usable_text(raw), ""
        else:
            caption, lang = _described_caption(raw, data[more:more_end] if more >= 0 else b"{}")
        # A view: the image need not be copied out of the read.
        return Pair(self._keys[row], memoryview(data)[image:image_end], caption, lang)

    def read_image(self, index: int) -> CaptionedImage:
        pair = self.read(index)
        return CaptionedImage(pair.key, pair.image, [pair.text], [pair.lang])

    def _read_apart(self, places: tuple[int, ...]) -> tuple[bytes, list[int]]:
        """The files of a sample joined, and begin and end of each in that."""
        data = b""
        found: list[int] = []
        for begin, end in zip(places[2::2], places[3::2], strict=True):
            payload = self._source.read(begin, end - begin) if begin >= 0 else b""
            found += [len(data) if begin >= 0 else -1, len(data) + len(payload)]
            data += payload
        return data, found


class CuratedShard:
    """A tar with the table of its pairs beside it."""

    def __init__(self, name: str, source: ByteSource, index: ShardIndex, table: "pyarrow.Table") -> None:
        self.name = name
        self.unsafe_names = index.unsafe_names
        self.changed = index.changed
        self._source = source
        try:
            keys: list[str] = table["key"].to_pylist()
            langs = [lang or "" for lang in table["lang"].to_pylist()]
        except UnicodeDecodeError as error:
            raise ShardError(f"its .parquet: {error}") from None
        if None in keys:
            raise ShardError("its .parquet has a row without a key")
        if not keys:
            raise ShardError("its .parquet has no rows")
        # Captions stay in Arrow's buffers, as bytes, until their turn: a bad one then costs itself alone.
        self._texts = table["text"].combine_chunks()
        self._entries = table["entries"].combine_chunks() if "entries" in table.column_names else None
        self._keys = keys
        self._langs = np.array(langs)
        self._rows_of: dict[str, list[int]] = {}
        for row, key in enumerate(keys):
            self._rows_of.setdefault(key, []).append(row)
        self._image_keys = list(self._rows_of)
        self.num_keys = len(self._image_keys)
        self._hashes = hash_keys(keys)
        self._images = dict(zip(index.keys, index.places[:, :2].tolist(), strict=True))

    @cached_property
    def _text_hashes(self) -> npt.NDArray[np.uint64]:
        return hash_keys([(raw or b"").decode("utf-8", "surrogateescape") for raw in self._texts.to_pylist()])

    def select_rows(self, probs: Probabilities | None, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        offsets, ids = np.zeros(len(self._keys) + 1, np.int64), np.zeros(0, np.uint32)
        if probs is not None:
            if self._entries is None:
                raise UserError(f"{self.name}: data.balance is set, but the .parquet beside it has no entries column")
            offsets, ids = self._entries.offsets.to_numpy(), self._entries.values.to_numpy()
        try:
            return select(self._hashes, self._text_hashes, offsets, ids, self._langs, probs, seed=seed, epoch=epoch)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        return self._hashes

    def read(self, row: int) -> Pair:
        key = self._keys[row]
        return Pair(key, self._image(key), self._text(row), self._lang(row))

    def read_image(self, index: int) -> CaptionedImage:
        key = self._image_keys[index]
        rows = self._rows_of[key]
        return CaptionedImage(
            key,
            self._image(key),
            [self._text(row) for row in rows],
            [self._lang(row) for row in rows],
        )

    def _image(self, key: str) -> bytes:
        place = self._images.get(key)
        if place is None:
            raise SkipSample("image_missing")
        return _read_payload(self._source, *place)

    def _text(self, row: int) -> str:
        raw = self._texts[row].as_py()
        if raw is None:
            raise SkipSample("caption_missing")
        return _usable_text(raw)

    def _lang(self, row: int) -> str:
        return str(self._langs[row])


def _described_caption(raw: bytes | None, raw_json: bytes) -> tuple[str, str]:
    """Caption and language of a plain sample by its ``.txt`` and its ``.json``."""
    described = _parse_object(raw_json)
    lang = described.get("lang")
    if raw is not None:
        caption = _usable_text(raw)
    else:
        text = described.get("caption", described.get("text"))
        if not isinstance(text, str):
            raise SkipSample("caption_missing")
        # JSON can spell half of a surrogate pair, which no encoding of text has.
        caption = _usable_text(text.encode("utf-8", "surrogatepass"))
    return caption, lang if isinstance(lang, str) else ""


def _read_payload(source: ByteSource, offset: int, size: int) -> bytes:
    try:
        return source.read(offset, size)
    except OSError as error:
        raise SkipSample("read_error", str(error)) from None


def _usable_text(raw: bytes) -> str:
    try:
        text = raw.decode().strip()
    except UnicodeDecodeError as error:
        raise SkipSample("caption_not_utf8", str(error)) from None
    if not text:
        raise SkipSample("caption_empty")
    return text


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise SkipSample("caption_not_utf8", str(error)) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise SkipSample("caption_not_json", str(error)) from None
    if not isinstance(value, dict):
        raise SkipSample("caption_not_json", "not an object")
    return value


def _read_pairs_table(path: Path) -> "pyarrow.Table | None":
    """Columns ``key``, ``text`` (as bytes), ``lang``, perhaps ``entries``; None if ``path`` is absent or other data."""
    if not path.is_file():
        return None
    # Plain shards must not pay for this import in every worker.
    import pyarrow
    import pyarrow.parquet

    types = {"key": "string", "text": "large_binary", "lang": "string", "entries": pyarrow.list_(pyarrow.uint32())}
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in types if name in file.schema_arrow.names]
            if not {"key", "text"} <= set(columns):
                return None
            table = file.read(columns=columns, use_threads=False)
        if "lang" not in columns:
            table = table.append_column("lang", pyarrow.nulls(len(table), "string"))
        return pyarrow.table({name: table[name].cast(types[name]) for name in table.column_names})
    except (pyarrow.ArrowException, OSError) as error:
        raise ShardError(f"{path.name}: {str(error).splitlines()[0]}") from None
