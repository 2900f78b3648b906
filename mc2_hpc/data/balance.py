"""The balance folder that curation leaves: one array of keep probabilities a language, mapped into memory on demand."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mc2_hpc.errors import UserError


class BalanceFolder(Mapping[str, npt.NDArray[np.float32]]):
    """``probs/<lang>.npy`` of a folder with ``balance.json``, by language; workers reopen it after pickling.

    Raises:
        UserError: the folder is none that ``mc2 curate`` finished, or a file of it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "balance.json").is_file():
            raise UserError(f"{folder}: no balance.json there; data.balance names the folder that `mc2 curate` wrote")
        # Languages come from the data, so they are looked up among the files, never joined to a path.
        self._files = {path.stem: path for path in sorted((self.folder / "probs").glob("*.npy"))}
        if not self._files:
            raise UserError(f"{folder}: no probs/<lang>.npy there; run the balance stage of `mc2 curate` again")
        self._open: dict[str, npt.NDArray[np.float32]] = {}

    def __getitem__(self, lang: str) -> npt.NDArray[np.float32]:
        if lang not in self._open:
            path = self._files[lang]
            try:
                probs = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: not readable as an array ({error})") from None
            if probs.ndim != 1 or probs.dtype != np.float32:
                raise UserError(f"{path}: holds {probs.dtype} of shape {probs.shape}, not one float32 an entry")
            self._open[lang] = probs
        return self._open[lang]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]
