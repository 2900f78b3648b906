"""Find every metadata entry that occurs in a text, by the rules of :mod:`mc2_hpc.curation.matching.rules`.

Patterns with a space at both ends are looked up as windows of tokens in hash tables, all others in a trie over code
points; both find all overlapping occurrences. The tables are plain arrays: built once, saved as ``.npy``, and
memory-mapped by every process that matches.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.curation.matching.rules import (
    CONTEXT,
    NORMALISE,
    can_match,
    character_table,
    check_mode,
    composed,
    pattern_or_none,
)
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.files import check_entries
from mc2_hpc.reading.arrays import map_array
from mc2_hpc.reading.json_file import Count, Foreign, read_json
from mc2_hpc.storage import write_array, write_json

_FORMAT = 3
LAST_SAVED = "matcher.json"
"""The last file that :meth:`Matcher.save` writes to the folder of tables."""
_CURE = "damaged matcher table: delete its folder and match again"


class _Info(Foreign):
    """``matcher.json``; if the format is another, nothing else in it is used."""

    format: int
    mode: str = ""
    num_entries: Count = 0
    crc32: dict[str, Count] = {}
    """Of each table's bytes, because compiled loops trust whatever they contain."""


_ARRAYS = {
    "actions": np.uint8,
    "vocabulary": np.uint64,
    "token_words": np.uint64,
    "token_edges": np.uint64,
    "character_edges": np.uint64,
    "openings": np.uint8,
}
"""Name and type of each table, in the argument order of :func:`match_kernels.match_texts`."""


class Matcher:
    """The tables of one language's entries. Create one with :meth:`build` or :meth:`load`."""

    def __init__(self, mode: str, num_entries: int, tables: dict[str, npt.NDArray]):
        self.mode = mode
        self.num_entries = num_entries
        self._tables = tables
        for table in tables.values():
            table.flags.writeable = False  # built and memory-mapped tables then share one compiled signature

    @classmethod
    def build(cls, entries: Sequence[str], mode: str = "fixed") -> Matcher:
        """Build the tables of ``entries``, whose positions are the entry ids.

        Raises:
            UserError: an unknown mode; no entries; a blank or repeated entry; or nothing is left of any entry.
        """
        from mc2_hpc.curation.matching import trie_kernels

        check_mode(mode)
        check_entries(entries, "metadata")
        found = [pattern_or_none(entry, mode) for entry in entries]
        if not any(found):
            raise UserError(f"metadata: entry {entries[0]!r} is blank, and so is every other; remove them")
        patterns = {position: p for position, p in enumerate(found) if p is not None and can_match(p, mode)}
        whole = [p for p, pattern in patterns.items() if len(pattern) > 1 and pattern[0] == pattern[-1] == " "]
        between_spaces = frozenset(whole)
        other = [p for p in patterns if p not in between_spaces]
        vocabulary, token_words, token_edges = trie_kernels.build_token_trie(
            *_join([patterns[p][1:-1] for p in whole], "utf-8", np.uint8), np.array(whole, np.int64)
        )
        character_edges, openings = trie_kernels.build_character_trie(
            *_join([patterns[p] for p in other], "utf-32-le", np.uint32), np.array(other, np.int64)
        )
        tables = {
            "actions": character_table(mode).copy(),
            "vocabulary": vocabulary,
            "token_words": token_words,
            "token_edges": token_edges,
            "character_edges": character_edges,
            "openings": openings,
        }
        return cls(mode, len(entries), tables)

    def match(self, texts: Sequence[str] | pa.Array | pa.ChunkedArray) -> tuple[npt.NDArray, npt.NDArray]:
        """Entries of each text.

        Args:
            texts: strings, or an Arrow array of them (read without copying); null counts as empty.

        Returns:
            offsets int64 ``(len(texts) + 1,)`` and ids uint32: text ``i`` has ``ids[offsets[i]:offsets[i + 1]]``,
            sorted and unique.

        Raises:
            UserError: a text is not valid UTF-8 or contains a lone surrogate.
        """
        from mc2_hpc.curation.matching import match_kernels

        column = _string_column(texts)
        data, offsets = _buffers(column)
        actions, *tables = (self._tables[name] for name in _ARRAYS)
        fixed = self.mode == "fixed"
        if fixed:
            flags = match_kernels.text_flags(data, offsets, actions)
            if (flags & NORMALISE).any():
                data, offsets = _buffers(_composed(column, flags))
        return match_kernels.match_texts(data, offsets, actions, fixed, *tables)

    @property
    def nbytes(self) -> int:
        """Size of all tables in bytes."""
        return sum(table.nbytes for table in self._tables.values())

    def save(self, folder: str | Path) -> None:
        """Write the tables as ``<name>.npy``, and ``matcher.json`` last: without it the folder counts as unfinished."""
        folder = Path(folder)
        (folder / LAST_SAVED).unlink(missing_ok=True)
        sums = {name: zlib.crc32(table.data) for name, table in self._tables.items()}
        for name, table in self._tables.items():
            write_array(folder / f"{name}.npy", table)
        write_json(
            folder / LAST_SAVED, {"format": _FORMAT, "mode": self.mode, "num_entries": self.num_entries, "crc32": sums}
        )

    @classmethod
    def load(cls, folder: str | Path) -> Matcher:
        """Memory-map the tables that :meth:`save` wrote.

        Raises:
            UserError: tables are missing, unfinished, damaged or in another version of the format.
        """
        folder = Path(folder)
        info = read_json(folder / LAST_SAVED, _Info, cure=_CURE)
        if info.format != _FORMAT:
            raise UserError(f"{folder}: matcher tables in another format; delete the folder and match again")
        tables = {name: _map_table(folder / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()}
        for name, table in tables.items():
            if zlib.crc32(table.data) != info.crc32.get(name):
                raise UserError(f"{folder / name}.npy: does not match its checksum; {_CURE}")
        return cls(info.mode, info.num_entries, tables)


def is_saved(folder: Path) -> bool:
    """Whether this version's :meth:`Matcher.save` finished in ``folder``; another version's tables are rebuilt."""
    if not (folder / LAST_SAVED).is_file():
        return False
    return read_json(folder / LAST_SAVED, _Info, cure=_CURE).format == _FORMAT


def _map_table(path: Path, dtype: type) -> npt.NDArray:
    # An empty file cannot be mapped, and the compiled loops need the plain array type.
    return np.asarray(map_array(path, dtype, cure=_CURE)).view(np.ndarray)


def _join(patterns: list[str], encoding: str, dtype: type) -> tuple[npt.NDArray, npt.NDArray]:
    """The units of all patterns in one array, and where each pattern starts, int64 ``(len(patterns) + 1,)``."""
    units: list[npt.NDArray] = [np.frombuffer(pattern.encode(encoding), dtype) for pattern in patterns]
    offsets = np.zeros(len(patterns) + 1, np.int64)
    np.cumsum([len(unit) for unit in units], out=offsets[1:])
    return (np.concatenate(units) if units else np.zeros(0, dtype)), offsets


def _string_column(texts: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.LargeStringArray:
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    try:
        column = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
        column.validate(full=True)
    except (pa.ArrowInvalid, UnicodeEncodeError) as error:  # the latter from lone surrogates
        raise UserError(f"texts to match: {error}; drop texts that are not UTF-8 first") from None
    return column.cast(pa.large_string()).fill_null("")


def _buffers(column: pa.LargeStringArray) -> tuple[npt.NDArray, npt.NDArray]:
    """Bytes (uint8) and offsets (int64) behind an Arrow column, without a copy."""
    if len(column) == 0:
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    _, offset_buffer, data_buffer = column.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer else np.zeros(0, np.uint8)
    return data, offsets


def _composed(column: pa.LargeStringArray, flags: npt.NDArray[np.uint8]) -> pa.LargeStringArray:
    """``column``, with rows that have the flag :data:`NORMALISE` composed as mode ``fixed`` does."""
    doubtful = (flags & NORMALISE) != 0
    mask = pa.array(doubtful)
    # Use Python's tables, which composed the entries, rather than Arrow's: the two follow different Unicode versions.
    texts = column.filter(mask).to_pylist()
    replacements = [unicodedata.normalize("NFC", text) for text in texts]
    for row in np.flatnonzero(flags[doubtful] & CONTEXT):
        replacements[row] = composed(texts[row])
    return pc.replace_with_mask(column, mask, pa.array(replacements, pa.large_string()))
