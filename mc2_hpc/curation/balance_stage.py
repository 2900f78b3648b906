"""Stage 2: counts of a matched pool -> thresholds and keep probabilities."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc2_hpc.curation import csr
from mc2_hpc.curation.balance import entry_probabilities, mass_to_threshold, threshold_to_mass
from mc2_hpc.curation.counts import add_votes, read_votes
from mc2_hpc.curation.match_stage import SETTINGS, counts_path, is_matched, rows_by_language, sum_stats
from mc2_hpc.curation.matched import entries_of, read_matched
from mc2_hpc.curation.sampling import keep_probability
from mc2_hpc.curation.shards import Progress, stats_path
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.files import metadata_files, read_entries
from mc2_hpc.storage import atomic_path, file_sha256, read_json, write_json

ENGLISH = "en"
_REPORT = "balance.json"


def balance(
    matched: str | Path, metadata: str | Path, out: str | Path, t_en: int, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Set every language's threshold so that its tail holds the share of matches that English's holds at ``t_en``.

    Writes ``counts/<lang>.npy`` (uint64), ``probs/<lang>.npy`` (float32) and, last, ``balance.json``, which is
    returned.

    Args:
        matched: folder that :func:`match_stage.match` filled, every shard of it finished.
        t_en: threshold of English; English keeps it as it is.

    Raises:
        UserError: unfinished or foreign input, ``t_en`` below 1, or no English caption matched.
    """
    matched, out = Path(matched), Path(out)
    settings = read_settings(matched)
    languages = metadata_files(metadata)
    hashes = {lang: file_sha256(path) for lang, path in languages.items()}
    if hashes != settings["metadata"]:
        raise UserError(f"{metadata}: not the metadata that {matched} was matched with; name that, or match again")
    counts = _total_counts(matched, settings["shards"], languages, progress)
    if ENGLISH not in counts:
        raise UserError(
            f"{matched}: no English caption matched, so t_en={t_en} has no meaning; add English captions and metadata"
        )
    p = threshold_to_mass(counts[ENGLISH], t_en)
    thresholds = {lang: t_en if lang == ENGLISH else mass_to_threshold(c, p) for lang, c in counts.items()}
    probs = {lang: entry_probabilities(counts[lang], t) for lang, t in thresholds.items()}
    (out / _REPORT).unlink(missing_ok=True)  # until it is written again, the folder counts as unfinished
    _write_arrays(out / "counts", counts)
    _write_arrays(out / "probs", probs)
    expected = _expected_texts(matched, settings["shards"], probs, progress)
    stats = sum_stats([read_json(stats_path(matched, name)) for name in settings["shards"]])
    rows = {
        lang: {
            **stats["languages"][lang],
            "entries": len(counts[lang]),
            "entries_matched": int((counts[lang] > 0).sum()),
            "entries_head": int((counts[lang] > thresholds[lang]).sum()),
            "tail_mass": threshold_to_mass(counts[lang], thresholds[lang]),
            "expected_texts": expected[lang],
        }
        for lang in counts
    }
    report = {
        "t_en": t_en,
        "p": p,
        "t": thresholds,
        "mode": settings["mode"],
        "languages": rows,
        "languages_without_matches": sorted(set(languages) - set(counts)),
        "totals": {"shards": len(settings["shards"]), **{name: stats[name] for name in ("rows", "matched", "images")}},
        "drops": stats["drops"],
        "english_share_before": rows[ENGLISH]["texts"] / stats["matched"],
        "english_share_after": expected[ENGLISH] / sum(expected[lang] for lang in sorted(expected)),
        "sources": {
            "metadata": hashes,
            "counts": {lang: file_sha256(out / "counts" / f"{lang}.npy") for lang in counts},
            "language_id": settings["language_id"],
        },
    }
    write_json(out / _REPORT, report)
    return report


def read_settings(matched: Path) -> dict[str, Any]:
    """Settings and shards of a matched pool, all of whose shards are finished.

    Raises:
        UserError: not a matched pool, or matching is not finished.
    """
    if not (matched / SETTINGS).is_file():
        raise UserError(f"{matched}: not a matched pool (no {SETTINGS}); run `mc2 curate match` first")
    settings = read_json(matched / SETTINGS)
    missing = [name for name in settings["shards"] if not is_matched(matched, name)]
    if missing:
        raise UserError(
            f"{matched}: {len(missing)} of {len(settings['shards'])} shards are not matched yet (the first is "
            f"{missing[0]!r}); run the same `mc2 curate match` again"
        )
    return settings


def _total_counts(
    matched: Path, shards: list[str], languages: Mapping[str, Path], progress: Progress | None
) -> dict[str, npt.NDArray[np.uint64]]:
    """Counts of every language that was matched at all, in code order."""
    totals: dict[str, npt.NDArray[np.uint64]] = {}
    for done, name in enumerate(shards, start=1):
        for lang, votes in read_votes(counts_path(matched, name)).items():
            if lang not in totals:
                totals[lang] = np.zeros(len(read_entries(languages[lang])), np.uint64)
            add_votes(totals[lang], votes)
        if progress:
            progress("count", done, len(shards), name)
    return dict(sorted(totals.items()))


def _expected_texts(
    matched: Path, shards: list[str], probs: Mapping[str, npt.NDArray[np.float32]], progress: Progress | None
) -> dict[str, float]:
    """Sum of the keep probabilities of each language's texts."""
    expected = dict.fromkeys(probs, 0.0)
    for done, name in enumerate(shards, start=1):
        rows = read_matched(matched / f"{name}.parquet", ["lang", "entries"])
        offsets, ids = entries_of(rows)
        for lang, members in rows_by_language(rows):
            expected[lang] += float(keep_probability(*csr.take(offsets, ids, members), probs[lang]).sum())
        if progress:
            progress("expected share", done, len(shards), name)
    return expected


def _write_arrays(folder: Path, arrays: Mapping[str, npt.NDArray]) -> None:
    """Make ``folder`` hold exactly ``<lang>.npy`` of these arrays; those of an earlier balance go."""
    for lang, array in arrays.items():
        with atomic_path(folder / f"{lang}.npy") as temporary:
            np.save(temporary, array, allow_pickle=False)
    for path in folder.glob("*.npy"):
        if path.stem not in arrays and not path.name.startswith("."):
            path.unlink()
