"""Training shards as tables of image-text pairs, with one class for curated and one for plain WebDataset shards.

A **curated** shard is ``<shard>.tar`` with images and ``<shard>.parquet`` beside it, with columns ``key`` and ``text``
and optionally ``lang`` and ``entries``; several rows may share a key. A **plain** shard is any other WebDataset tar,
whose members :mod:`mc2_hpc.samples` describes. The Parquet files that img2dataset and DataComp put beside their tars
lack ``text`` or ``key``, so those shards are plain.
"""

import errno
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mc2_hpc.balancing.selection import choose_texts, select
from mc2_hpc.caption_tables import SOURCE, caption_table
from mc2_hpc.data.caption_fields import CaptionFields, FieldReader
from mc2_hpc.data.crop import Encoded
from mc2_hpc.data.index import ShardIndex, cache_folder, open_index
from mc2_hpc.data.skips import ShardError
from mc2_hpc.draws import hash_keys
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.samples import LARGEST_RECORD, ByKey, Caption, captions_of, usable_text
from mc2_hpc.tar import ByteSource, LocalFile

if TYPE_CHECKING:
    import pyarrow

_PLACES = struct.Struct("=8q")
"""A row of :attr:`ShardIndex.places`."""

Probabilities = Mapping[str, npt.NDArray[np.float32]]
"""Keep probability of each metadata entry, by language."""


class Pair(NamedTuple):
    """One image, still encoded, and one of its captions; ``lang`` is empty if unknown."""

    key: str
    image: Encoded
    text: str
    lang: str = ""
    field: str = ""
    """The caption field (:mod:`mc2_hpc.data.caption_fields`) that was drawn, if several are configured."""
    url: str = ""
    """Where the image is from, if that is known and asked for."""


@dataclass(frozen=True)
class Extras:
    """What to read of samples beyond an image and its ordinary caption."""

    fields: CaptionFields | None = None
    """To draw captions from; None means the caption table, or the ``.txt``, else the record."""
    urls: bool = False
    """The addresses of images: ``url`` in records, ``source`` in caption tables."""

    @property
    def records(self) -> bool:
        """Whether records are needed beside captions."""
        return self.urls or (self.fields is not None and self.fields.in_records)

    @property
    def columns(self) -> list[str]:
        """Columns of caption tables that are caption fields."""
        return self.fields.columns if self.fields is not None else []


PLAIN = Extras()
"""Nothing more."""


class Shard(Protocol):
    """What the stream and evaluation need from either kind of shard. A *row* is one caption of one image."""

    name: str
    """For messages: its path or address."""
    drops: dict[str, int]
    """Members of the tar that were left out, by reason."""
    changed: bool
    """Whether it was rewritten since it was last listed."""
    images_digest: int
    """Of its images' keys, places and sizes (:meth:`mc2_hpc.data.index.ShardIndex.images_digest`)."""
    num_keys: int
    row_keys: list[str]
    """The key of each row."""

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """Hash of each row's key, for random draws in the data path."""
        ...

    def select_rows(self, probs: Probabilities | None, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The rows that an epoch trains on: one per image, or none if balancing drops it.

        Raises UserError if ``probs`` do not fit the shard.
        """
        ...

    def read(self, row: int, *, seed: int, epoch: int) -> Pair:
        """Row ``row`` in ``epoch``. Raises Dropped."""
        ...

    def read_captions(self, index: int) -> list[Caption]:
        """All captions of image ``index`` of ``num_keys``; the image is not read. Raises Dropped."""
        ...

    def read_texts(self, index: int) -> list[str]:
        """All captions that :meth:`read` may draw of image ``index`` of ``num_keys``, at least one. Raises Dropped."""
        ...

    def read_image(self, index: int) -> Encoded:
        """Image ``index`` of ``num_keys``, still encoded. Raises Dropped."""
        ...


def open_shard(
    path: Path,
    *,
    name: str | None = None,
    cache: Path | None = None,
    pin: object = None,
    extras: Extras = PLAIN,
) -> Shard:
    """Open either kind of shard and list its content, or read its stored index.

    Args:
        name: for messages; None is the path.
        cache: folder for indexes of shards whose own folder cannot be written; None is the user's cache folder.
        pin: kept alive as long as the shard.
        extras: to read of its samples.
    Raises:
        ShardError: missing, empty, damaged or truncated.
    """
    try:
        source = LocalFile(path, pin)
        table = caption_table(path.with_suffix(".parquet"), texts=extras.columns, addresses=extras.urls)
        index = open_index(path, source, cache=cache or cache_folder(), records=extras.records)
    except UserError as error:
        raise ShardError(str(error)) from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # not the shard's fault
            raise UserError(
                f"{path}: {error.strerror}: raise the limit (`ulimit -n`), or set data.lanes lower"
            ) from None
        raise ShardError(error.strerror or str(error)) from None
    if table is None:
        return PlainShard(name or str(path), source, index, extras)
    return CuratedShard(name or str(path), source, index, table, extras)


class PlainShard:
    """A WebDataset tar with one row per sample. One of several captions in a record is drawn, as in curated shards."""

    def __init__(self, name: str, source: ByteSource, index: ShardIndex, extras: Extras = PLAIN) -> None:
        self.name = name
        self._extras = extras
        self.drops = index.drops
        self.changed = index.changed
        self.images_digest = index.images_digest()
        self.num_keys = len(index.keys)
        self._source = source
        self.row_keys = index.keys
        self._hashes = index.hashes
        # Unpacking numbers from bytes is faster than from an array, and bytes are smaller than lists.
        self._places = index.places.tobytes()

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        return self._hashes

    def select_rows(self, probs: Probabilities | None, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        if probs is not None:
            raise UserError(
                f"{self.name}: data.balance is set, but this is not a curated shard (no .parquet with key, text, lang "
                f"and entries beside it): curate the data first, or unset data.balance"
            )
        return np.arange(self.num_keys)

    def read(self, row: int, *, seed: int, epoch: int) -> Pair:
        image, text, record = self._read(row)
        reader = FieldReader(text, record)
        url = reader.url() if self._extras.urls else ""
        if self._extras.fields is not None:
            field, chosen = self._extras.fields.draw(reader, self._hashes[row], seed=seed, epoch=epoch)
            return Pair(self.row_keys[row], image, chosen, reader.lang(), field, url)
        captions = captions_of(text, record)
        caption = captions[0]
        if len(captions) > 1:
            keys = np.repeat(self._hashes[row], len(captions))
            caption = captions[choose_texts(keys, [text for text, _ in captions], seed=seed, epoch=epoch)[0]]
        return Pair(self.row_keys[row], image, *caption, url=url)

    def _read(self, row: int) -> tuple[Encoded, bytes | None, bytes | None]:
        """Image, caption and record of a sample, of which the latter may be missing."""
        places = _PLACES.unpack_from(self._places, row * _PLACES.size)
        begin, size, image, image_end, text, text_end, more, more_end = places
        if image < 0:
            raise Dropped(Drop.IMAGE_MISSING)
        try:
            if size >= 0:
                data = self._source.read(begin, size)
            else:
                data, (image, image_end, text, text_end, more, more_end) = self._read_apart(places)
        except OSError as error:
            raise Dropped(Drop.READ_ERROR, str(error)) from None
        caption = data[text:text_end] if text >= 0 else None
        record = data[more:more_end] if more >= 0 else None
        # A view, so that the image is not copied.
        return memoryview(data)[image:image_end], caption, record

    def read_captions(self, index: int) -> list[Caption]:
        return captions_of(*self._caption_files(index))

    def read_texts(self, index: int) -> list[str]:
        caption, record = self._caption_files(index)
        if self._extras.fields is not None:
            return self._extras.fields.texts(FieldReader(caption, record))
        return [text for text, _ in captions_of(caption, record)]

    def _caption_files(self, index: int) -> tuple[bytes | None, bytes | None]:
        """Caption and record of a sample that has an image."""
        begin, size, image, _, *texts = _PLACES.unpack_from(self._places, index * _PLACES.size)
        if image < 0:
            raise Dropped(Drop.IMAGE_MISSING)
        start = begin if size >= 0 else 0  # of the single read that covers all files
        caption, record = (
            _read_payload(self._source, start + first, min(end - first, LARGEST_RECORD + 1)) if first >= 0 else None
            for first, end in zip(texts[::2], texts[1::2], strict=True)
        )
        return caption, record

    def read_image(self, index: int) -> Encoded:
        begin, size, image, end, *_ = _PLACES.unpack_from(self._places, index * _PLACES.size)
        if image < 0:
            raise Dropped(Drop.IMAGE_MISSING)
        return _read_payload(self._source, (begin if size >= 0 else 0) + image, end - image)

    def _read_apart(self, places: tuple[int, ...]) -> tuple[bytes, list[int]]:
        """The concatenated files of a sample, and the begin and end of each."""
        data = b""
        found: list[int] = []
        for begin, end in zip(places[2::2], places[3::2], strict=True):
            payload = self._source.read(begin, end - begin) if begin >= 0 else b""
            found += [len(data) if begin >= 0 else -1, len(data) + len(payload)]
            data += payload
        return data, found


class CuratedShard:
    """A tar with a table of its pairs beside it."""

    def __init__(
        self,
        name: str,
        source: ByteSource,
        index: ShardIndex,
        table: "pyarrow.Table",
        extras: Extras = PLAIN,
    ) -> None:
        self.name = name
        self._extras = extras
        self.drops = index.drops
        self.changed = index.changed
        self.images_digest = index.images_digest()
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
        # Captions stay in Arrow's buffers as bytes until they are read, so that a bad caption costs only itself.
        self._texts = table["text"].combine_chunks()
        self._entries = table["entries"].combine_chunks() if "entries" in table.column_names else None
        self.row_keys = keys
        self._langs = np.array(langs)
        self._rows_of: dict[str, list[int]] = {}
        for row, key in enumerate(keys):
            self._rows_of.setdefault(key, []).append(row)
        self._image_keys = list(self._rows_of)
        self.num_keys = len(self._image_keys)
        self._hashes = hash_keys(keys)
        self._images = ByKey(_places_of(index, "image"))
        for column in extras.columns:
            if column not in table.column_names:
                there = ", ".join(table.column_names)
                raise UserError(f"{name}: the .parquet beside it has no column {column!r}, only {there}")
        more = [*extras.columns, SOURCE] if extras.urls and SOURCE in table.column_names else extras.columns
        self._columns = {column: table[column].combine_chunks() for column in more}
        if extras != PLAIN:
            self._captions = ByKey(_places_of(index, "caption"))
            self._records = ByKey(_places_of(index, "record"))

    @cached_property
    def _text_hashes(self) -> npt.NDArray[np.uint64]:
        return hash_keys([(raw or b"").decode("utf-8", "surrogateescape") for raw in self._texts.to_pylist()])

    def select_rows(self, probs: Probabilities | None, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        offsets, ids = np.zeros(len(self.row_keys) + 1, np.int64), np.zeros(0, np.uint32)
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

    def read(self, row: int, *, seed: int, epoch: int) -> Pair:
        key = self.row_keys[row]
        if self._extras == PLAIN:
            return Pair(key, self._image(key), self._text(row), self._lang(row))
        reader, columns = self._reader(row)
        url = self._url(reader, columns) if self._extras.urls else ""
        if self._extras.fields is None:
            return Pair(key, self._image(key), self._text(row), self._lang(row), url=url)
        field, caption = self._extras.fields.draw(reader, self._hashes[row], seed=seed, epoch=epoch)
        return Pair(key, self._image(key), caption, self._lang(row), field, url)

    def _reader(self, row: int) -> tuple[FieldReader, Mapping[str, bytes | None]]:
        """The caption fields of a row, and its values in the columns that are read besides."""
        key = self.row_keys[row]
        columns = {name: column[row].as_py() for name, column in self._columns.items()}
        return FieldReader(self._payload(self._captions, key), self._payload(self._records, key), columns), columns

    def _url(self, reader: FieldReader, columns: Mapping[str, bytes | None]) -> str:
        """The address of an image: in its table, else in its record."""
        return (columns.get(SOURCE) or b"").decode("utf-8", "replace") or reader.url()

    def _payload(self, places: ByKey[tuple[int, int]], key: str) -> bytes | None:
        place = places.get(key)
        return None if place is None or place[1] > LARGEST_RECORD else _read_payload(self._source, *place)

    def read_captions(self, index: int) -> list[Caption]:
        key = self._image_keys[index]
        if self._images.get(key) is None:
            raise Dropped(Drop.IMAGE_MISSING)
        return [Caption(self._text(row), self._lang(row)) for row in self._rows_of[key]]

    def read_texts(self, index: int) -> list[str]:
        texts: list[str] = []
        problem: Dropped | None = None
        for row in self._rows_of[self._image_keys[index]]:
            try:
                fields = self._extras.fields
                texts += [self._text(row)] if fields is None else fields.texts(self._reader(row)[0])
            except Dropped as failure:
                if failure.reason == Drop.READ_ERROR:
                    raise
                problem = problem or failure
        if not texts and problem is not None:
            raise problem
        return texts

    def read_image(self, index: int) -> Encoded:
        return self._image(self._image_keys[index])

    def _image(self, key: str) -> bytes:
        place = self._images.get(key)
        if place is None:
            raise Dropped(Drop.IMAGE_MISSING)
        return _read_payload(self._source, *place)

    def _text(self, row: int) -> str:
        raw = self._texts[row].as_py()
        if raw is None:
            raise Dropped(Drop.CAPTION_MISSING)
        return usable_text(raw)

    def _lang(self, row: int) -> str:
        return str(self._langs[row])


def _places_of(index: ShardIndex, file: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Key, and offset in the tar and size, of each sample that has a ``file`` of :data:`mc2_hpc.data.index.FILES`."""
    offsets, sizes = index.extents(file)
    for key, offset, length in zip(index.keys, offsets.tolist(), sizes.tolist(), strict=True):
        if offset >= 0:
            yield key, (offset, length)


def _read_payload(source: ByteSource, offset: int, size: int) -> bytes:
    try:
        return source.read(offset, size)
    except OSError as error:
        raise Dropped(Drop.READ_ERROR, str(error)) from None
