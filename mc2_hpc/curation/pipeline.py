"""Curation end to end: match, balance, pack.

Each stage may be run alone, and a killed one is continued by calling it again.
"""

from pathlib import Path
from typing import Any

from mc2_hpc.balancing.folder import read_report
from mc2_hpc.curation.balance import balance, plan_balance
from mc2_hpc.curation.match import MatchStats, match, plan_match
from mc2_hpc.curation.pack import pack, plan_pack
from mc2_hpc.curation.pool.language_id import LanguageIdentifier
from mc2_hpc.jobs.engines import Engine
from mc2_hpc.jobs.stages import Progress, run_stages, sum_stats

__all__ = ["balance", "match", "pack", "run"]


def run(
    pool: str | Path,
    metadata: str | Path,
    out: str | Path,
    *,
    t_en: int,
    mode: str = "fixed",
    identifier: LanguageIdentifier | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """All stages in turn, into ``out/matched``, ``out/balance`` and ``out/shards``.

    Args:
        engine: where the work is done; one worker of this machine by default. On Slurm all stages are submitted at
            once, each depending on the one before.

    Returns:
        what each stage returns, under ``match``, ``balance`` and ``pack``; None where the work was only submitted

    Raises:
        UserError: see :func:`match`, :func:`balance` and :func:`pack`.
    """
    matched, balanced, shards = (Path(out) / name for name in ("matched", "balance", "shards"))
    matching = plan_match(pool, metadata, matched, mode, identifier)
    balancing = plan_balance(matched, metadata, balanced, t_en)
    packing = plan_pack(pool, matched, shards)
    if not run_stages([*matching, *balancing, *packing], engine, progress):
        return None
    return {
        "match": sum_stats(matched, list(matching[-1].shards), MatchStats),
        "balance": read_report(balanced),
        "pack": sum_stats(shards, list(packing[-1].shards)),
    }
