"""NumPy's NPY and NPZ files: element type, dimensions and length are checked against the caller's expectations.

Nothing is unpickled, and a header cannot cause more memory to be allocated than the file has bytes.
"""

import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc2_hpc.errors import UserError, first_line
from mc2_hpc.reading.files import check_regular, open_regular, raise_open_files, shown

# NumPy parses headers as Python, so a bad header can raise any of these.
_UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile),
    *(SyntaxError, tokenize.TokenError, RecursionError, OverflowError, MemoryError),
)


def map_array(
    path: str | Path, dtype: npt.DTypeLike, *, ndim: int = 1, length: int | None = None, cure: str = ""
) -> npt.NDArray[Any]:
    """An NPY file, memory-mapped read-only.

    It stays open as long as the array exists, so this process may open as many files afterwards as the system allows
    (:func:`~mc2_hpc.reading.files.raise_open_files`).

    Args:
        length: of the first dimension, if known.
        cure: how to get a good file, for the end of the message.

    Raises:
        UserError: no such file, damaged, or wrong type, number of dimensions or length.
    """
    size = check_regular(path)
    raise_open_files()  # a table per language can be more than the usual 1,024
    tail = f"; {cure}" if cure else ""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except _UNREADABLE as error:
        raise UserError(f"{shown(path)}: not readable as an array ({first_line(error)}){tail}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{shown(path)}: contains several arrays, not one{tail}")
    if array.nbytes > size:
        raise UserError(f"{shown(path)}: cut off{tail}")
    _check(shown(path), array, dtype, ndim, length, tail)
    return array


@contextmanager
def open_npz(path: str | Path, *, cure: str = "") -> Iterator["Arrays"]:
    """The arrays of an NPZ file, read on demand.

    Raises:
        UserError: no such file, or damaged; also raised when an array is read.
    """
    tail = f"; {cure}" if cure else ""
    with open_regular(path) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                yield Arrays(str(path), archive, tail)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{shown(path)}: not readable as arrays ({first_line(error)}){tail}") from None


class Arrays:
    """Arrays of an open NPZ file by name."""

    def __init__(self, path: str, archive: zipfile.ZipFile, tail: str) -> None:
        self._path, self._archive, self._tail = path, archive, tail
        names = [info.filename for info in archive.infolist()]
        if len(set(names)) < len(names):
            raise UserError(f"{shown(path)}: contains two arrays of the same name{tail}")
        self.names = [name.removesuffix(".npy") for name in names]

    def read(self, name: str, dtype: npt.DTypeLike, *, ndim: int = 1, length: int | None = None) -> npt.NDArray[Any]:
        """One array.

        Raises:
            UserError: it is missing or damaged, or has the wrong type, number of dimensions or length.
        """
        where = f"{shown(self._path)}: {shown(name)}"
        if name not in self.names:
            raise UserError(f"{where}: is missing{self._tail}")
        info = self._archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > Path(self._path).stat().st_size:
            raise UserError(f"{where}: is compressed, unlike the files that mc2 writes{self._tail}")
        try:
            with self._archive.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                shape, _, found = _HEADERS[version](stream)
                if np.prod(shape, dtype=float) * found.itemsize > info.file_size:
                    raise ValueError(f"shape {shape} does not fit its {info.file_size} bytes")
            with self._archive.open(info) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
        except _UNREADABLE as error:
            raise UserError(f"{where}: not readable as an array ({first_line(error)}){self._tail}") from None
        _check(where, array, dtype, ndim, length, self._tail)
        return array

    def read_texts(self, name: str) -> list[str]:
        """An array of strings as a list. Raises like :meth:`read`."""
        return self.read(name, np.str_).tolist()


_HEADERS: Mapping[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _check(where: str, array: npt.NDArray[Any], dtype: npt.DTypeLike, ndim: int, length: int | None, tail: str) -> None:
    wanted = np.dtype(dtype)
    fits = array.dtype.kind == "U" if wanted.kind == "U" else array.dtype == wanted
    if not fits or array.ndim != ndim:
        dimensions = "one dimension" if ndim == 1 else f"{ndim} dimensions"
        raise UserError(f"{where}: has {array.dtype} of shape {array.shape}, expected {wanted} of {dimensions}{tail}")
    if length is not None and len(array) != length:
        raise UserError(f"{where}: has {len(array)} numbers, expected {length}{tail}")
