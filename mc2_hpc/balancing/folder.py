"""The balance folder that stage 2 leaves: its report, and the arrays of each language, mapped into memory on demand."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc2_hpc.errors import UserError
from mc2_hpc.storage import read_json

REPORT = "balance.json"


class BalanceFolder(Mapping[str, npt.NDArray[np.float32]]):
    """``probs/<lang>.npy`` of a folder with ``balance.json``, by language; workers reopen it after pickling.

    Raises:
        UserError: the folder is none that ``mc2 curate`` finished, or a file of it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / REPORT).is_file():
            raise UserError(f"{folder}: no {REPORT} there; name the folder that `mc2 curate balance` wrote")
        # Languages come from the data, so they are looked up among the files, never joined to a path.
        self._files = {path.stem: path for path in sorted((self.folder / "probs").glob("*.npy"))}
        if not self._files:
            raise UserError(f"{folder}: no probs/<lang>.npy there; run `mc2 curate balance` again")
        self._open: dict[str, npt.NDArray[np.float32]] = {}

    def report(self) -> dict[str, Any]:
        """What ``balance.json`` holds."""
        return read_json(self.folder / REPORT)

    def counts(self, lang: str) -> npt.NDArray[np.uint64]:
        """Matches of each entry of a language, uint64."""
        return _map_array(self.folder / "counts" / self._files[lang].name, np.uint64)

    def __getitem__(self, lang: str) -> npt.NDArray[np.float32]:
        if lang not in self._open:
            self._open[lang] = _map_array(self._files[lang], np.float32)
        return self._open[lang]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]


def _map_array(path: Path, dtype: type) -> npt.NDArray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not readable as an array ({error}); run `mc2 curate balance` again") from None
    if array.ndim != 1 or array.dtype != dtype:
        raise UserError(f"{path}: holds {array.dtype} of shape {array.shape}, not one {dtype.__name__} an entry")
    return array
