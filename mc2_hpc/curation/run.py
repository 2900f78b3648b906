"""Curation end to end: match, balance, pack."""

from collections.abc import Sequence
from pathlib import Path

from mc2_hpc.curation.balance import plan_balance
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.pack import plan_pack
from mc2_hpc.curation.pool.language_id import DEFAULT_IDENTIFIER
from mc2_hpc.jobs import Plan
from mc2_hpc.jobs.named import Named
from mc2_hpc.shard_paths import Names


def plan_run(
    pool: Names,
    metadata: str | Path,
    out: str | Path,
    *,
    t_en: int | None,
    mode: str = "fixed",
    language_id: str | Path = DEFAULT_IDENTIFIER,
    filters: Sequence[Named] = (),
) -> Plan:
    """All three in turn, into ``out/matched``, ``out/balance`` and ``out/shards``.

    On Slurm, all stages are submitted at once, each depending on the previous one.

    Returns:
        stages, whose result is that of each plan, under ``match``, ``balance`` and ``pack``

    Raises:
        UserError: see :func:`plan_match`, :func:`plan_balance` and :func:`plan_pack`.
    """
    matched, balance, shards = (Path(out) / name for name in ("matched", "balance", "shards"))
    plans = {
        "match": plan_match(pool, metadata, matched, mode, language_id=language_id, filters=filters),
        "balance": plan_balance(matched, metadata, balance, t_en, after_match=True),
        "pack": plan_pack(pool, matched, shards, after_match=True),
    }
    stages = tuple(stage for plan in plans.values() for stage in plan.stages)
    return Plan(stages, result=lambda: {name: plan.result() for name, plan in plans.items()})
