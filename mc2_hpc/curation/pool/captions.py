"""Caption pools: shards of candidate texts, beside the images they describe.

A shard is ``<name>.parquet`` (columns ``key``, ``text``, optional ``lang`` and ``source``) with the images in
``<name>.tar``, or a plain WebDataset tar alone, whose ``.txt`` (or ``.json`` with a ``caption``) members are the texts.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mc2_hpc.curation.pool.distinct import Distinct
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.errors import UserError
from mc2_hpc.tar import ESCAPES

BATCH_ROWS = 1 << 17
"""Rows of a Parquet shard that are in memory at a time."""

_NUL = pa.scalar("\0", pa.large_string())


@dataclass(frozen=True)
class PoolShard:
    """Files of one shard; ``captions`` is None where they are members of the tar."""

    name: str
    captions: Path | None
    images: Path | None


def list_pool(pool: str | Path) -> list[PoolShard]:
    """Shards of the folder, by name.

    Raises:
        UserError: no such folder, or neither ``.parquet`` nor ``.tar`` in it.
    """
    folder = Path(pool)
    if not folder.is_dir():
        raise UserError(f"{pool}: no such pool folder")
    files = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    names = sorted({name.rpartition(".")[0] for name in files if name.endswith((".parquet", ".tar"))})
    if not names:
        raise UserError(f"{pool}: no *.parquet or *.tar shards in this pool folder")

    def existing(name: str) -> Path | None:
        return folder / name if name in files else None

    return [PoolShard(name, existing(f"{name}.parquet"), existing(f"{name}.tar")) for name in names]


def iter_captions(shard: PoolShard, *, keep_repeated: bool = False) -> Iterator[tuple[pa.Table, Counter[str]]]:
    """Usable caption rows of a shard, piece by piece, and how many others were dropped of each piece, by reason.

    Reasons: ``missing_key``, ``unsafe_key`` (would escape its folder), ``invalid_utf8``, ``bad_json``, ``empty_text``,
    ``duplicate_text`` (the same key and text again, anywhere before in the shard). A piece of a Parquet shard is
    :data:`BATCH_ROWS` rows, so that a shard of any size fits in memory; the captions of a tar are one piece.

    Args:
        keep_repeated: drop nothing as ``duplicate_text``.

    Returns:
        tables of ``key``, ``text`` and, where the pool has them, ``lang`` and ``source``; large strings, one chunk;
        one table at least

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    seen = Distinct()
    for table, drops in _pieces(shard):
        table = _drop(table, drops, "invalid_utf8", ~_valid_utf8(table))
        table = _drop(table, drops, "missing_key", pc.equal(pc.binary_length(pc.fill_null(table["key"], "")), 0))
        table = _drop(table, drops, "unsafe_key", pc.match_substring_regex(table["key"], ESCAPES))
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(table["text"], ""))), 0)
        table = _drop(table, drops, "empty_text", blank)
        if not keep_repeated:
            # A key has no NUL here, so that key + NUL + text is as good as the pair.
            pairs = pc.binary_join_element_wise(table["key"], table["text"], _NUL).combine_chunks()
            table = _drop(table, drops, "duplicate_text", ~seen.is_new(pairs))
        yield table, drops


def _pieces(shard: PoolShard) -> Iterator[tuple[pa.Table, Counter[str]]]:
    if shard.captions is not None:
        yield from ((table, Counter()) for table in _read_parquet(shard.captions))
    else:
        assert shard.images is not None
        yield _read_tar_captions(shard.images)


def _read_parquet(path: Path) -> Iterator[pa.Table]:
    try:
        # Through a buffer and not ahead, or a row group is read whole, however large it is.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            schema = file.schema_arrow
            missing = [name for name in ("key", "text") if name not in schema.names]
            if missing:
                raise UserError(f"{path}: no column {missing[0]!r}; a caption pool needs key and text")
            names = [name for name in ("key", "text", "lang", "source") if name in schema.names]
            for name in names:
                if schema.names.count(name) > 1:
                    raise UserError(f"{path}: {schema.names.count(name)} columns {name!r}; keep one")
                _check_string(path, schema.field(name))
            if file.metadata.num_rows == 0:
                yield _one_chunk(schema.empty_table().select(names))
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                yield _one_chunk(pa.table(batch).select(names))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from None


def _check_string(path: Path, field: pa.Field) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise UserError(f"{path}: column {field.name!r} is {field.type}, must be string")


def _one_chunk(table: pa.Table) -> pa.Table:
    columns = {name: table[name].cast(pa.large_string()).combine_chunks() for name in table.column_names}
    return pa.table(columns)


def _valid_utf8(table: pa.Table) -> np.ndarray:
    """Rows (bool) whose every string is valid UTF-8; Parquet does not promise it."""
    valid = np.ones(len(table), bool)
    for name in table.column_names:
        column = table[name].combine_chunks()
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            raw = column.cast(pa.large_binary()).to_pylist()
            valid &= np.fromiter((_decodes(value) for value in raw), bool, len(raw))
    return valid


def _decodes(raw: bytes | None) -> bool:
    try:
        (raw or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def _drop(table: pa.Table, drops: Counter[str], reason: str, mask: pa.ChunkedArray | np.ndarray) -> pa.Table:
    unwanted = np.asarray(mask, bool)
    if not unwanted.any():
        return table
    drops[reason] += int(unwanted.sum())
    return table.filter(pa.array(~unwanted))


def _read_tar_captions(path: Path) -> tuple[pa.Table, Counter[str]]:
    """Captions that are members of a WebDataset tar; a ``.txt`` goes before the ``.json`` of the same key."""
    drops: Counter[str] = Counter()
    found: dict[str, bytes | None] = {}
    with TarIndex(path) as index:
        members = {name: member for name, member in index.members.items() if name.endswith((".txt", ".json"))}
        for name in members:
            key, _, extension = name.rpartition(".")
            if extension == "txt":
                found[key] = index.read(name)
            elif f"{key}.txt" not in members:
                found[key] = _caption_of_json(index.read(name))
    keys, texts = [], []
    for key, raw in found.items():
        if raw is None:
            drops["bad_json"] += 1
        elif not _decodes(raw) or not _decodes(key.encode("utf-8", "surrogateescape")):
            drops["invalid_utf8"] += 1
        else:
            keys.append(key)
            texts.append(raw.decode())
    strings = pa.large_string()
    return pa.table({"key": pa.array(keys, strings), "text": pa.array(texts, strings)}), drops


def _caption_of_json(raw: bytes) -> bytes | None:
    """The ``caption`` of an img2dataset record; None if there is none or the record is no JSON object."""
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    caption = record.get("caption") if isinstance(record, dict) else None
    if caption is None and isinstance(record, dict) and "caption" in record:
        return b""  # a null caption is an empty one
    return caption.encode("utf-8", "surrogatepass") if isinstance(caption, str) else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
