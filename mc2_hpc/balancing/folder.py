"""The balance folder that stage 2 writes: its report, and each language's arrays, memory-mapped on demand."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc2_hpc.errors import UserError
from mc2_hpc.reading.arrays import map_array
from mc2_hpc.reading.json_file import Count, File, Foreign, Sha256, Size, read_fields, read_json

REPORT = "balance.json"
_CURE = "run `mc2 curate balance` again"


class _Language(File):
    texts: Count
    matches: Count
    images: Count
    entries: Size
    entries_matched: Count
    entries_head: Count
    tail_mass: float
    expected_texts: float


class _Totals(File):
    shards: Count
    rows: Count
    matched: Count
    images: Count


class _Sources(File, omit_defaults=True):
    metadata: dict[str, Sha256]
    counts: dict[str, Sha256]
    language_id: Any
    filters: list[dict[str, Any]] | None = None
    """What samples went through, in order: each filter's name and options."""


class Report(File):
    """``balance.json``."""

    t_en: Size
    p: float
    t: dict[str, Size]
    mode: str
    languages: dict[str, _Language]
    languages_without_matches: dict[str, str]
    totals: _Totals
    drops: dict[str, Count]
    english_share_before: float
    english_share_after: float
    sources: _Sources


class _LanguageLength(Foreign):
    entries: Size


class _Lengths(Foreign):
    """The fields of ``balance.json`` that arrays are checked against."""

    languages: dict[str, _LanguageLength] = {}


class BalanceFolder(Mapping[str, npt.NDArray[np.float32]]):
    """``probs/<lang>.npy`` of a folder with ``balance.json``, by language; workers reopen it after pickling.

    Raises:
        UserError: ``mc2 curate`` has not finished the folder, or a file in it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / REPORT).is_file():
            raise UserError(f"{folder}: no {REPORT} there; name the folder that `mc2 curate balance` wrote")
        # Language codes come from the data, so they are looked up among the files, never joined to a path.
        self._files = {path.stem: path for path in sorted((self.folder / "probs").glob("*.npy"))}
        if not self._files:
            raise UserError(f"{folder}: no probs/<lang>.npy there; run `mc2 curate balance` again")
        self._open: dict[str, npt.NDArray[np.float32]] = {}
        self._lengths: _Lengths | None = None

    def report(self) -> dict[str, Any]:
        """Contents of ``balance.json``."""
        return read_report(self.folder)

    def counts(self, lang: str) -> npt.NDArray[np.uint64]:
        """Matches of each entry of a language, uint64."""
        return map_array(
            self.folder / "counts" / self._files[lang].name, np.uint64, length=self._num_entries(lang), cure=_CURE
        )

    def __getitem__(self, lang: str) -> npt.NDArray[np.float32]:
        if lang not in self._open:
            probs = map_array(self._files[lang], np.float32, length=self._num_entries(lang), cure=_CURE)
            if len(probs) and not (probs.min() >= 0 and probs.max() <= 1):  # NaN fails both
                raise UserError(f"{self._files[lang]}: contains numbers that are not probabilities; {_CURE}")
            self._open[lang] = probs
        return self._open[lang]

    def _num_entries(self, lang: str) -> int | None:
        """Number of entries of a language, if the report says."""
        if self._lengths is None:
            self._lengths = read_json(self.folder / REPORT, _Lengths, cure=_CURE)
        row = self._lengths.languages.get(lang)
        return None if row is None else row.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]


def read_report(folder: Path) -> dict[str, Any]:
    """Contents of ``balance.json`` in ``folder``.

    Raises:
        UserError: it is missing or damaged.
    """
    return read_fields(folder / REPORT, Report, cure=_CURE)
