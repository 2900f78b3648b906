"""Curation end to end: match, balance, pack.

Each stage may be run alone, and a killed one is continued by calling it again.
"""

from pathlib import Path
from typing import Any

from mc2_hpc.curation.balance_stage import balance
from mc2_hpc.curation.language_id import LanguageIdentifier
from mc2_hpc.curation.match_stage import match
from mc2_hpc.curation.pack_stage import pack
from mc2_hpc.curation.shards import Progress

__all__ = ["balance", "match", "pack", "run"]


def run(
    pool: str | Path,
    metadata: str | Path,
    out: str | Path,
    *,
    t_en: int,
    mode: str = "fixed",
    identifier: LanguageIdentifier | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All stages in turn, into ``out/matched``, ``out/balance`` and ``out/shards``.

    Returns:
        what each stage returns, under ``match``, ``balance`` and ``pack``

    Raises:
        UserError: see :func:`match`, :func:`balance` and :func:`pack`.
    """
    out = Path(out)
    matched = match(pool, metadata, out / "matched", mode, identifier=identifier, workers=workers, progress=progress)
    balanced = balance(out / "matched", metadata, out / "balance", t_en, progress=progress)
    packed = pack(pool, out / "matched", out / "shards", workers=workers, progress=progress)
    return {"match": matched, "balance": balanced, "pack": packed}
