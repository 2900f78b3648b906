"""Caption pools: shards of candidate texts beside the images they describe.

A shard is ``<name>.parquet`` (columns ``key``, ``text``, optional ``lang`` and ``source``) with the images in
``<name>.tar``, or just a plain WebDataset tar, whose members :mod:`mc2_hpc.samples` describes. Other kinds of Parquet
files beside a tar, such as those of img2dataset and DataComp, are ignored.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.caption_tables import KEY, LANG, SOURCE, TEXT, column_types, is_caption_table
from mc2_hpc.curation.pool.distinct import Distinct
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.reading.parquet_file import open_parquet
from mc2_hpc.samples import CAPTION_EXTENSION, RECORD_EXTENSION, Caption, is_unicode
from mc2_hpc.shard_paths import Names, list_shards
from mc2_hpc.tar import ESCAPES, Member, escapes

BATCH_ROWS = 1 << 17
"""Rows of a Parquet shard that are in memory at a time."""

FETCH_SETTINGS, OUTCOMES = "fetch.json", "fetched"
"""In a pool with fetched images: how they were fetched, and the folder of tables of what became of each key."""
FILTER_SETTINGS, VERDICTS = "filter.json", "judged"
"""In a filtered pool: the filters, and the folder of tables of what became of each caption."""
DEDUP_SETTINGS = "dedup_images.json"
"""In a pool without copies of images: how they were found."""
_TABLES = {FETCH_SETTINGS: OUTCOMES, FILTER_SETTINGS: VERDICTS}

_NUL = pa.scalar("\0", pa.large_string())


@dataclass(frozen=True)
class PoolShard:
    """Files of one shard; ``captions`` is None if they are members of the tar."""

    name: str
    captions: Path | None
    images: Path | None


def list_pool(pool: Names) -> list[PoolShard]:
    """Shards of a pool, by name: the path below the folder that they all share.

    Args:
        pool: a folder, file, pattern or list, see :mod:`mc2_hpc.shard_paths`.

    Raises:
        UserError: no such pool, or it has neither ``.parquet`` nor ``.tar`` files.
    """
    files = [path.absolute() for path in list_shards(pool, ".parquet", ".tar")]
    root = Path(os.path.commonpath([path.parent for path in files]))
    # Of nested shards: the tables that fetching or filtering wrote beside them.
    tables = [root / folder for file, folder in _TABLES.items() if (root / file).is_file()]
    found: dict[str, dict[str, Path]] = {}
    for path in files:
        if any(path.is_relative_to(folder) for folder in tables):
            continue
        found.setdefault(str(path.relative_to(root).with_suffix("")), {})[path.suffix.lower()] = path
    return [PoolShard(name, kinds.get(".parquet"), kinds.get(".tar")) for name, kinds in sorted(found.items())]


def iter_captions(shard: PoolShard, *, keep_repeated: bool = False) -> Iterator[tuple[pa.Table, Counter[str]]]:
    """Usable caption rows of a shard, piece by piece, with the number dropped from each piece by reason.

    Reasons (:data:`mc2_hpc.drops.MEANINGS`): ``key_missing``, ``name_unsafe``, ``caption_missing``,
    ``caption_not_utf8``, ``caption_not_json``, ``caption_empty``, ``caption_repeated`` (the same key and text earlier
    in the shard). A piece of a Parquet shard is :data:`BATCH_ROWS` rows, so that a shard of any size fits in memory;
    the captions of a tar are one piece, or two if some samples name their language.

    Args:
        keep_repeated: drop nothing as ``caption_repeated``.

    Returns:
        tables of ``key``, ``text`` and, if the pool has them, ``lang`` and ``source``; large strings, one chunk; at
        least one table

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    seen = Distinct()
    for table, drops in _pieces(shard):
        table = _drop(table, drops, Drop.CAPTION_NOT_UTF8, ~_valid_utf8(table))
        table = _drop(table, drops, Drop.KEY_MISSING, pc.equal(pc.binary_length(pc.fill_null(table["key"], "")), 0))
        table = _drop(table, drops, Drop.NAME_UNSAFE, pc.match_substring_regex(table["key"], ESCAPES))
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(table["text"], ""))), 0)
        table = _drop(table, drops, Drop.CAPTION_EMPTY, blank)
        if not keep_repeated:
            # A key has no NUL here, so key + NUL + text is unique to the pair.
            pairs = pc.binary_join_element_wise(table["key"], table["text"], _NUL).combine_chunks()
            table = _drop(table, drops, Drop.CAPTION_REPEATED, ~seen.is_new(pairs))
        yield table, drops


def _pieces(shard: PoolShard) -> Iterator[tuple[pa.Table, Counter[str]]]:
    if shard.captions is not None and (shard.images is None or is_caption_table(shard.captions)):
        yield from ((table, Counter()) for table in _read_parquet(shard.captions))
    else:
        assert shard.images is not None
        yield from _read_tar_captions(shard.images)


def _read_parquet(path: Path) -> Iterator[pa.Table]:
    types = column_types()
    required, optional = {name: types[name] for name in (KEY, TEXT)}, {name: types[name] for name in (LANG, SOURCE)}
    what = "a table of captions"
    # Buffered and without pre-buffering: otherwise a row group of any size is read whole.
    with open_parquet(path, required, optional=optional, what=what, buffer_size=1 << 20, pre_buffer=False) as file:
        schema = file.schema_arrow
        names = [name for name in (KEY, TEXT, LANG, SOURCE) if name in schema.names]
        if file.metadata.num_rows == 0:
            yield _one_chunk(schema.empty_table().select(names))
        for batch in file.iter_batches(BATCH_ROWS, columns=names):
            yield _one_chunk(pa.table(batch).select(names))


def _one_chunk(table: pa.Table) -> pa.Table:
    columns = {name: table[name].cast(pa.large_string()).combine_chunks() for name in table.column_names}
    return pa.table(columns)


def _valid_utf8(table: pa.Table) -> np.ndarray:
    """Which rows (bool) have only valid UTF-8 strings; Parquet does not guarantee it."""
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


def _read_tar_captions(path: Path) -> Iterator[tuple[pa.Table, Counter[str]]]:
    """Captions that are members of a WebDataset tar: first those of samples that name their language, then the rest."""
    drops: Counter[str] = Counter()
    found: dict[bool, list[tuple[str, Caption]]] = {True: [], False: []}
    with TarIndex(path) as index:
        if index.members and not index.listing.samples and not index.listing.drops:
            raise UserError(f"{path}: {index.listing.describe_others()}")
        if unsafe := sum(map(_is_unsafe_caption, index.members)):
            drops[Drop.NAME_UNSAFE] = unsafe
        for sample in index.listing.samples.values():
            if sample.caption is None and sample.record is None:
                continue  # an image without a caption is counted when the images are packed
            try:
                if not is_unicode(sample.key):
                    raise Dropped(Drop.CAPTION_NOT_UTF8)
                for caption in index.captions_of(sample):
                    found[bool(caption.lang)].append((sample.key, caption))
            except Dropped as dropped:
                drops[dropped.reason] += 1
    for has_lang, captions in found.items():
        columns = {
            KEY: [key for key, _ in captions],
            TEXT: [caption.text for _, caption in captions],
            **({LANG: [caption.lang for _, caption in captions]} if has_lang else {}),
        }
        if captions or not has_lang:
            yield pa.table({name: pa.array(column, pa.large_string()) for name, column in columns.items()}), drops
            drops = Counter()


def _is_unsafe_caption(member: Member) -> bool:
    return escapes(member.name) and member.name.lower().endswith((f".{CAPTION_EXTENSION}", f".{RECORD_EXTENSION}"))
