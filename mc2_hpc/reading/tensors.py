"""Headers of safetensors files, read and checked without torch before any tensor is loaded.

Format: a little-endian uint64 with the length of a JSON object, the object ``{name: {dtype, shape, data_offsets}}``,
then the tensors' bytes without gaps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import open_regular, shown
from mc2_hpc.reading.json_file import Count, File, parse_json

_MOST_HEADER_BYTES = 100_000_000  # safetensors' own bound
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8}
_BITS |= {"U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}


class _Entry(File):
    dtype: str
    shape: Annotated[list[Count], msgspec.Meta(max_length=16)]
    data_offsets: tuple[Count, Count]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file."""

    path: Path
    dtype: str
    """In safetensors' notation: ``F32``, ``BF16``, ``I64`` ..."""
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, in the order of the file's header.

    Raises:
        UserError: not a regular file, or its header and size do not agree.
    """
    path = Path(path)
    with open_regular(path) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
            raise _damaged(path, "cut off, or not in this format")
        header = stream.read(length)
    try:
        raw = parse_json(header.rstrip(b" "), dict[str, msgspec.Raw], path)
        entries = {
            name: parse_json(bytes(value), _Entry, f"{path}: {name}")
            for name, value in raw.items()
            if name != "__metadata__"
        }
    except UserError as error:
        raise _damaged(path, str(error).removeprefix(f"{path}: ")) from None
    _check(path, entries, size - 8 - length)
    return {name: TensorInfo(path, entry.dtype, tuple(entry.shape)) for name, entry in entries.items()}


def _check(path: Path, entries: Mapping[str, _Entry], num_bytes: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in _BITS:
            raise _damaged(path, f"{shown(name)}: unknown type {shown(entry.dtype[:20])!r}")
        begin, stop = entry.data_offsets
        if begin != end or stop < begin or (stop - begin) * 8 != math.prod(entry.shape) * _BITS[entry.dtype]:
            raise _damaged(path, f"{shown(name)}: its offsets do not fit its shape and type")
        end = stop
    if end != num_bytes:
        raise _damaged(path, f"its tensors have {end} bytes, the file {num_bytes}")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{shown(path)}: damaged safetensors file ({reason})")
