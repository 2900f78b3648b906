"""Training shards as tables of image-text pairs: curated ones and plain WebDataset ones behind one class each.

A **curated** shard is ``<shard>.tar`` of ``<key>.jpg`` with ``<shard>.parquet`` beside it: columns ``key`` and
``text``, perhaps ``lang`` and ``entries``; several rows may share a key. A **plain** shard is any other WebDataset tar:
files of one key up to the first dot of their names, a picture and a caption (``.txt``, or ``caption`` or ``text`` of
a ``.json``, which may also have ``lang``). The Parquet file that img2dataset leaves beside its tars has no ``text``
column, so those shards are plain.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mc2_hpc.curation.sampling import hash_keys, select
from mc2_hpc.data.skips import SkipSample
from mc2_hpc.data.tar import ByteSource, LocalFile, Member, ShardError, list_members
from mc2_hpc.errors import UserError

if TYPE_CHECKING:
    import pyarrow

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

Probabilities = Mapping[str, npt.NDArray[np.float32]]
"""Keep probability of each metadata entry, by language."""


@dataclass(frozen=True)
class Pair:
    """One picture, still encoded, and one of its captions; ``lang`` is empty where nobody knows it."""

    key: str
    image: bytes
    text: str
    lang: str = ""


@dataclass(frozen=True)
class Picture:
    """One picture, still encoded, and all of its captions."""

    key: str
    image: bytes
    texts: list[str]
    langs: list[str]


class Shard(Protocol):
    """What the stream and the evaluation need of a shard of either kind. A *row* is one caption of one picture."""

    path: Path
    unsafe_names: int
    """Members left out because their names lead out of the shard."""
    num_keys: int

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """Hash of each row's key, for the draws of the data path."""
        ...

    def select_rows(self, probs: Probabilities | None, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The rows an epoch trains on: one a picture, or none where balancing drops it.

        Raises UserError where ``probs`` do not fit the shard.
        """
        ...

    def read(self, row: int) -> Pair:
        """Raises SkipSample."""
        ...

    def read_picture(self, index: int) -> Picture:
        """Picture ``index`` of ``num_keys``. Raises SkipSample."""
        ...


def open_shard(path: Path) -> Shard:
    """Open a shard of either kind and list what it holds.

    Raises:
        ShardError: missing, empty, damaged or cut off.
    """
    try:
        source = LocalFile(path)
        members, unsafe = list_members(source)
        table = _read_pairs_table(path.with_suffix(".parquet"))
    except OSError as error:
        raise ShardError(str(error)) from None
    if table is None:
        return PlainShard(path, source, members, unsafe)
    return CuratedShard(path, source, members, unsafe, table)


class PlainShard:
    """A WebDataset tar: every picture has one caption, so rows and pictures are the same."""

    def __init__(self, path: Path, source: ByteSource, members: Sequence[Member], unsafe_names: int) -> None:
        self.path = path
        self.unsafe_names = unsafe_names
        self._source = source
        self._samples = [(key, files) for key, files in _group(members).items() if _is_sample(files)]
        self.num_keys = len(self._samples)
        if not self._samples:
            raise ShardError("holds neither pictures nor captions")
        self._hashes = hash_keys([key for key, _ in self._samples])

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        return self._hashes

    def select_rows(self, probs: Probabilities | None, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        if probs is not None:
            raise UserError(
                f"{self.path}: data.balance is set, but this is no curated shard (no .parquet with key, text, lang and "
                f"entries beside it): curate the data first, or unset data.balance"
            )
        return np.arange(self.num_keys)

    def read(self, row: int) -> Pair:
        key, files = self._samples[row]
        image = next((files[ext] for ext in IMAGE_EXTENSIONS if ext in files), None)
        if image is None:
            raise SkipSample("image_missing")
        text, lang = self._caption(files)
        return Pair(key, _read_payload(self._source, image), _require_text(text), lang)

    def read_picture(self, index: int) -> Picture:
        pair = self.read(index)
        return Picture(pair.key, pair.image, [pair.text], [pair.lang])

    def _caption(self, files: dict[str, Member]) -> tuple[str, str]:
        described: dict[str, Any] = {}
        if "json" in files:
            raw = _read_payload(self._source, files["json"])
            if "txt" not in files or b'"lang"' in raw:  # parsing is for those who need what is inside
                described = _parse_object(raw)
        if "txt" in files:
            text: Any = _decode_text(_read_payload(self._source, files["txt"]))
        else:
            text = described.get("caption", described.get("text"))
        if not isinstance(text, str):
            raise SkipSample("caption_missing")
        lang = described.get("lang")
        return text, lang if isinstance(lang, str) else ""


class CuratedShard:
    """A tar with the table of its pairs beside it."""

    def __init__(
        self, path: Path, source: ByteSource, members: Sequence[Member], unsafe_names: int, table: "pyarrow.Table"
    ) -> None:
        self.path = path
        self.unsafe_names = unsafe_names
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
        self._pictures = list(self._rows_of)
        self.num_keys = len(self._pictures)
        self._hashes = hash_keys(keys)
        self._images = _images_by_stem(members)

    @cached_property
    def _text_hashes(self) -> npt.NDArray[np.uint64]:
        return hash_keys([(raw or b"").decode("utf-8", "surrogateescape") for raw in self._texts.to_pylist()])

    def select_rows(self, probs: Probabilities | None, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        offsets, ids = np.zeros(len(self._keys) + 1, np.int64), np.zeros(0, np.uint32)
        if probs is not None:
            if self._entries is None:
                raise UserError(f"{self.path}: data.balance is set, but the .parquet beside it has no entries column")
            offsets, ids = self._entries.offsets.to_numpy(), self._entries.values.to_numpy()
        try:
            return select(self._hashes, self._text_hashes, offsets, ids, self._langs, probs, seed=seed, epoch=epoch)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        return self._hashes

    def read(self, row: int) -> Pair:
        key = self._keys[row]
        return Pair(key, self._image(key), _require_text(self._text(row)), self._lang(row))

    def read_picture(self, index: int) -> Picture:
        key = self._pictures[index]
        rows = self._rows_of[key]
        return Picture(
            key,
            self._image(key),
            [_require_text(self._text(row)) for row in rows],
            [self._lang(row) for row in rows],
        )

    def _image(self, key: str) -> bytes:
        member = self._images.get(key)
        if member is None:
            raise SkipSample("image_missing")
        return _read_payload(self._source, member)

    def _text(self, row: int) -> str:
        raw = self._texts[row].as_py()
        if raw is None:
            raise SkipSample("caption_missing")
        return _decode_text(raw)

    def _lang(self, row: int) -> str:
        return str(self._langs[row])


def _group(members: Iterable[Member]) -> dict[str, dict[str, Member]]:
    """Members by key and lower-case extension: the first dot of the file name divides them.

    Hidden files are left out. Of a name that occurs again the first stays, as in curation.
    """
    groups: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if stem and dot:
            groups.setdefault(folder + slash + stem, {}).setdefault(extension.lower(), member)
    return groups


def _is_sample(files: dict[str, Member]) -> bool:
    return any(extension in files for extension in (*IMAGE_EXTENSIONS, "txt", "json"))


def _images_by_stem(members: Iterable[Member]) -> dict[str, Member]:
    """Pictures by all of the name before the extension; unlike a plain shard's, a curated key may have dots."""
    images: dict[str, Member] = {}
    for member in members:
        stem, _, extension = member.name.rpartition(".")
        if extension.lower() in IMAGE_EXTENSIONS:
            images.setdefault(stem, member)
    return images


def _read_payload(source: ByteSource, member: Member) -> bytes:
    try:
        return source.read(member.offset, member.size)
    except OSError as error:
        raise SkipSample("read_error", str(error)) from None


def _decode_text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SkipSample("caption_not_utf8", str(error)) from None


def _require_text(text: str) -> str:
    text = text.strip()
    if not text:
        raise SkipSample("caption_empty")
    # JSON can spell half of a surrogate pair, which no encoding of text has.
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise SkipSample("caption_not_utf8", "lone surrogate")
    return text


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(_decode_text(raw))
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
