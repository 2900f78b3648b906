"""Stage 2: counts of a matched pool -> thresholds and keep probabilities.

There are four steps, so that no process handles all shards or all languages at once. The shards' counts are merged as a
tree; one task sets the thresholds, language by language; every shard sums the keep probabilities of its texts; one task
writes the report.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc2_hpc.balancing import csr
from mc2_hpc.balancing.folder import read_report
from mc2_hpc.balancing.selection import keep_probability
from mc2_hpc.balancing.thresholds import (
    check_threshold,
    entry_probabilities,
    mass_to_threshold,
    proposed_threshold,
    threshold_to_mass,
)
from mc2_hpc.curation.counts import VotesFile, dense, merge_tree, merge_votes, merged_path
from mc2_hpc.curation.matched import (
    MERGED,
    SETTINGS,
    MatchStats,
    counts_path,
    entries_of,
    matched_batches,
    planned_settings,
    read_settings,
    rows_by_language,
)
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import REDO, Plan, Stage, sum_stats
from mc2_hpc.metadata.files import metadata_files, read_entries
from mc2_hpc.reading.arrays import map_array
from mc2_hpc.reading.json_file import Count, File, Sha256, Size, read_fields, read_json
from mc2_hpc.storage import file_sha256, write_array, write_json

ENGLISH = "en"
_REPORT = "balance.json"
_THRESHOLDS = "thresholds.json"


class _Row(File):
    """One language in ``thresholds.json``."""

    t: Size
    counts_sha256: Sha256
    entries: Size
    entries_matched: Count
    entries_head: Count
    tail_mass: float


class _Thresholds(File):
    t_en: Size
    p: float
    languages: dict[str, _Row]


def plan_balance(
    matched: str | Path, metadata: str | Path, out: str | Path, t_en: int | None, *, after_match: bool = False
) -> Plan:
    """Set every language's threshold so that its tail holds the same share of matches as the English tail at ``t_en``.

    Writes ``counts/<lang>.npy`` (uint64), ``probs/<lang>.npy`` (float32) and finally ``balance.json``, the plan's
    result. With the same counts and ``t_en``, nothing is redone.

    Args:
        matched: folder that :func:`~mc2_hpc.curation.match.plan_match` fills, with every shard finished.
        t_en: threshold of English, used as it is; None:
            :func:`~mc2_hpc.balancing.thresholds.proposed_threshold`.
        after_match: the same plan matches first, so shards may be unfinished now.

    Raises:
        UserError: unfinished or foreign input, ``t_en`` below 1, or no English caption matched.
    """
    matched, out, metadata = Path(matched).absolute(), Path(out).absolute(), Path(metadata).absolute()
    settings = planned_settings(matched) if after_match else read_settings(matched)
    if t_en is not None:
        check_threshold(t_en)
    hashes = {lang: file_sha256(path) for lang, path in metadata_files(metadata).items()}
    if hashes != settings["metadata"]:
        raise UserError(f"{metadata}: not the metadata {matched} was matched with; name that one, or match again")
    shards = settings["shards"]
    digest = hashlib.sha256("\n".join(shards).encode("utf-8", "surrogateescape")).hexdigest()
    merged = matched / MERGED / digest[:16]  # one folder per set of shards
    levels = merge_tree([counts_path(matched, name) for name in shards], merged)
    root = merged_path(merged, next(iter(levels[-1])))
    sums = f"{MERGED}/{digest[:16]}/{{shard}}.npz"
    set_thresholds = SetThresholds(matched, metadata, out, t_en, root)
    stale = (out / "expected", out / _REPORT)
    stages = (
        *(
            Stage(f"count {number}", matched, level, Merge(merged), (sums,), unit="sums")
            for number, level in enumerate(levels, start=1)
        ),
        Stage("thresholds", out, {"thresholds": None}, set_thresholds, (_THRESHOLDS,), invalidates=stale),
        Stage("expected share", out, dict.fromkeys(shards), ExpectShard(matched, out), ("expected/{shard}.json",)),
        Stage("balance", out, {"balance": None}, WriteReport(matched, out, root), (_REPORT,)),
    )
    return Plan(stages, result=lambda: read_report(out))


@dataclass(frozen=True)
class Merge:
    """Sums the counts of several files."""

    folder: Path

    def __call__(self, name: str, parts: tuple[Path, ...]) -> None:
        merge_votes(parts, merged_path(self.folder, name))


@dataclass(frozen=True)
class SetThresholds:
    """Thresholds and probabilities of every language, one language in memory at a time."""

    matched: Path
    metadata: Path
    out: Path
    t_en: int | None
    root: Path

    def is_current(self, name: str, value: object) -> bool:
        """Whether ``thresholds.json`` was made from these counts and this ``t_en``."""
        marker = self._marker()
        if not (marker.is_file() and self.root.is_file()):
            return False
        return read_json(marker, dict[str, Any]) == self._made_of()

    def _marker(self) -> Path:
        return self.out / "logs" / f"made_of_{_THRESHOLDS}"

    def _made_of(self) -> dict[str, Any]:
        # Counts that are merged again may be equal although the captions changed, so the file's time counts too.
        merged_ns = self.root.stat().st_mtime_ns
        return {"t_en": self.t_en, "merged_ns": merged_ns, "match": file_sha256(self.matched / SETTINGS)}

    def __call__(self, name: str, value: None) -> None:
        files = metadata_files(self.metadata)
        with VotesFile(self.root) as votes:
            if ENGLISH not in votes.langs:
                raise UserError(
                    f"{self.matched}: no English caption matched, so t_en={self.t_en or 'auto'} is meaningless; add "
                    "English captions and metadata"
                )
            english = self._counts(votes, files, ENGLISH)
            t_en = self.t_en or proposed_threshold(english)
            p = threshold_to_mass(english, t_en)
            rows = {lang: self._set(lang, self._counts(votes, files, lang), p, t_en) for lang in sorted(votes.langs)}
        for kind in ("counts", "probs"):
            _keep_only(self.out / kind, set(rows))
        write_json(self.out / _THRESHOLDS, {"t_en": t_en, "p": p, "languages": rows})
        write_json(self._marker(), self._made_of())

    @staticmethod
    def _counts(votes: VotesFile, files: dict[str, Path], lang: str) -> npt.NDArray[np.uint64]:
        return dense(votes[lang], len(read_entries(files[lang])))

    def _set(self, lang: str, counts: npt.NDArray[np.uint64], p: float, t_en: int) -> dict[str, Any]:
        """Write a language's arrays and return its row of the report."""
        t = t_en if lang == ENGLISH else mass_to_threshold(counts, p)
        path = self.out / "counts" / f"{lang}.npy"
        write_array(path, counts)
        write_array(self.out / "probs" / f"{lang}.npy", entry_probabilities(counts, t))
        return {
            "t": t,
            "counts_sha256": file_sha256(path),
            "entries": len(counts),
            "entries_matched": int((counts > 0).sum()),
            "entries_head": int((counts > t).sum()),
            "tail_mass": threshold_to_mass(counts, t),
        }


def _keep_only(folder: Path, languages: set[str]) -> None:
    """Remove the ``<lang>.npy`` files of an earlier balance with other languages."""
    for path in folder.glob("*.npy"):
        if path.stem not in languages and not path.name.startswith("."):
            path.unlink()


def _expected_path(out: Path, shard: str) -> Path:
    return out / "expected" / f"{shard}.json"


@dataclass(frozen=True)
class ExpectShard:
    """Sum of the keep probabilities of a shard's texts, by language."""

    matched: Path
    out: Path

    def __call__(self, name: str, value: None) -> None:
        version = (self.out / _THRESHOLDS).stat().st_mtime_ns
        expected: Counter[str] = Counter()
        for rows in matched_batches(self.matched / f"{name}.parquet", ["lang", "entries"]):
            offsets, ids = entries_of(rows)
            for lang, members in rows_by_language(rows):
                probs = _probabilities(self.out / "probs" / f"{lang}.npy", version)
                expected[lang] += float(keep_probability(*csr.take(offsets, ids, members), probs).sum())  # type: ignore[assignment]
        write_json(_expected_path(self.out, name), dict(expected))


@lru_cache(maxsize=512)
def _probabilities(path: Path, version: int) -> npt.NDArray[np.float32]:
    """Memory-mapped; ``version`` distinguishes an array from a later one with the same name."""
    return map_array(path, np.float32, cure="run `mc2 curate balance` into another folder")


@dataclass(frozen=True)
class WriteReport:
    """``balance.json``."""

    matched: Path
    out: Path
    root: Path

    def __call__(self, name: str, value: None) -> None:
        settings, thresholds = read_settings(self.matched), read_fields(self.out / _THRESHOLDS, _Thresholds, cure=REDO)
        stats = sum_stats(self.matched, settings["shards"], MatchStats)
        expected: dict[str, float] = dict.fromkeys(thresholds["languages"], 0.0)
        for shard in settings["shards"]:
            for lang, texts in read_json(_expected_path(self.out, shard), dict[str, float], cure=REDO).items():
                expected[lang] += texts
        rows = {
            lang: {
                **stats["languages"][lang],
                **{key: row[key] for key in ("entries", "entries_matched", "entries_head", "tail_mass")},
                "expected_texts": expected[lang],
            }
            for lang, row in thresholds["languages"].items()
        }
        filters = [*settings.get("pool_filters", []), *settings.get("filters", [])]
        report = {
            "t_en": thresholds["t_en"],
            "p": thresholds["p"],
            "t": {lang: row["t"] for lang, row in thresholds["languages"].items()},
            "mode": settings["mode"],
            "languages": rows,
            "languages_without_matches": _without_matches(settings["metadata"], rows, stats["captions"]),
            "totals": {
                "shards": len(settings["shards"]),
                **{name: stats[name] for name in ("rows", "matched", "images")},
            },
            "drops": stats["drops"],
            "english_share_before": rows[ENGLISH]["texts"] / stats["matched"],
            "english_share_after": expected[ENGLISH] / sum(expected[lang] for lang in sorted(expected)),
            "sources": {
                "metadata": settings["metadata"],
                "counts": {lang: row["counts_sha256"] for lang, row in thresholds["languages"].items()},
                "language_id": settings["language_id"],
                **({"filters": filters} if filters else {}),
            },
        }
        write_json(self.out / _REPORT, report)


def _without_matches(languages: Sequence[str], matched: dict[str, Any], captions: dict[str, int]) -> dict[str, str]:
    """Languages that have metadata but no threshold, each with the reason."""
    return {
        lang: f"none of its {captions[lang]:,} captions contains an entry"
        if captions.get(lang)
        else "no caption of the pool is in this language"
        for lang in sorted(set(languages) - set(matched))
    }
