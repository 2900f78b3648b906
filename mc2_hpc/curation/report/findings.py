"""The report's data, gathered from the folders of a curation run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc2_hpc.balancing.folder import BalanceFolder
from mc2_hpc.curation.matched import SETTINGS as MATCH_SETTINGS
from mc2_hpc.curation.matched import MatchSettings, MatchStats
from mc2_hpc.curation.pack import SETTINGS as PACK_SETTINGS
from mc2_hpc.curation.pack import PackSettings, PackStats
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import stats_path, sum_stats
from mc2_hpc.metadata.files import metadata_files, read_entries
from mc2_hpc.metadata.languages import LANGUAGES
from mc2_hpc.reading.json_file import read_json
from mc2_hpc.storage import file_sha256

_TOP_ENTRIES = 10


@dataclass(frozen=True)
class TopEntry:
    """One of a language's most frequent entries."""

    entry: str
    count: int
    probability: float


@dataclass(frozen=True)
class LanguageFindings:
    """One language before and after balancing."""

    code: str
    name: str
    captions: int | None
    """Usable captions in the pool; None if the matched pool does not exist."""
    texts: int
    """Captions that matched."""
    images: int
    matches: int
    expected_texts: float
    """Sum of the keep probabilities of its texts."""
    share_before: float
    """Of all matched texts."""
    share_after: float
    """Of all expected texts."""
    entries: int
    entries_matched: int
    entries_head: int
    threshold: int
    tail_mass: float
    top: list[TopEntry]

    @property
    def match_rate(self) -> float | None:
        """Share of its captions that matched."""
        return self.texts / self.captions if self.captions else None

    @property
    def kept(self) -> float:
        """Expected share of its texts that pass balancing."""
        return self.expected_texts / self.texts


@dataclass(frozen=True)
class Findings:
    """A curation run."""

    balance: dict[str, Any]
    """``balance.json``."""
    languages: list[LanguageFindings]
    """The languages that matched, most texts first."""
    folder: BalanceFolder
    pack: dict[str, Any] | None
    """Counters of ``mc2 curate pack``; None if nothing is packed yet."""

    @property
    def expected_texts(self) -> float:
        """Sum of the keep probabilities of all matched texts."""
        return sum(language.expected_texts for language in self.languages)

    @property
    def drops(self) -> dict[str, int]:
        """Dropped caption rows, by reason."""
        return self.balance["drops"]


def gather(run: str | Path, metadata: str | Path) -> Findings:
    """Read the findings of a run, with one language's metadata in memory at a time.

    Args:
        run: the output folder of ``mc2 curate run``.
        metadata: the folder it was matched with.

    Raises:
        UserError: the run is not balanced yet, was matched again since, or used other metadata.
    """
    folder = BalanceFolder(Path(run) / "balance")
    balance = folder.report()
    files = metadata_files(metadata)
    before = sum(row["texts"] for row in balance["languages"].values())
    after = sum(row["expected_texts"] for row in balance["languages"].values())
    captions = _captions(Path(run), balance)
    languages = []
    for code, row in balance["languages"].items():
        if code not in files or file_sha256(files[code]) != balance["sources"]["metadata"][code]:
            raise UserError(f"{metadata}: {run} was curated with another {code}.json; name the metadata it used")
        language = LanguageFindings(
            code=code,
            name=LANGUAGES[code].name if code in LANGUAGES else code,
            captions=captions.get(code),
            texts=row["texts"],
            images=row["images"],
            matches=row["matches"],
            expected_texts=row["expected_texts"],
            share_before=row["texts"] / before,
            share_after=row["expected_texts"] / after,
            entries=row["entries"],
            entries_matched=row["entries_matched"],
            entries_head=row["entries_head"],
            threshold=balance["t"][code],
            tail_mass=row["tail_mass"],
            top=_top_entries(read_entries(files[code]), folder.counts(code), folder[code]),
        )
        languages.append(language)
    languages.sort(key=lambda language: (-language.texts, language.code))
    return Findings(balance, languages, folder, _packed(Path(run)))


def mass_curve(counts: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]:
    """Cumulative share of matches over entries sorted by count.

    Returns:
        distinct counts above 0, ascending, and the share of all matches on entries with at most that count
    """
    distinct, times = np.unique(counts[counts > 0], return_counts=True)
    mass = np.cumsum(distinct * times.astype(np.uint64), dtype=np.uint64)
    return distinct, mass / mass[-1]


def _captions(run: Path, balance: Mapping[str, Any]) -> dict[str, int]:
    """Captions of the pool by language, from the counters of matching; empty if those do not exist."""
    counters = _counters(run / "matched", MATCH_SETTINGS, MatchSettings, MatchStats)
    if counters is None:
        return {}
    if counters["matched"] != balance["totals"]["matched"]:
        raise UserError(f"{run / 'balance'}: made before {run / 'matched'}; run `mc2 curate balance` again")
    return counters["captions"]


def _packed(run: Path) -> dict[str, Any] | None:
    return _counters(run / "shards", PACK_SETTINGS, PackSettings, PackStats)


def _counters(folder: Path, file: str, settings: type[Any], counters: type[Any]) -> dict[str, Any] | None:
    """A stage's counters over all shards; None if it has not finished."""
    if not (folder / file).is_file():
        return None
    names: list[str] = read_json(folder / file, settings).shards
    return sum_stats(folder, names, counters) if all(stats_path(folder, name).is_file() for name in names) else None


def _top_entries(entries: list[str], counts: npt.NDArray[np.uint64], probs: npt.NDArray[np.float32]) -> list[TopEntry]:
    order = np.argsort(-counts.astype(np.int64), kind="stable")[:_TOP_ENTRIES]
    return [TopEntry(entries[i], int(counts[i]), float(probs[i])) for i in order.tolist() if counts[i] > 0]
