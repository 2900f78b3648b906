"""Files that a stage writes beside its outputs: its settings, and the counters of each finished shard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mc2_hpc.errors import UserError
from mc2_hpc.reading.json_file import Count, as_type, read_fields, read_json
from mc2_hpc.storage import write_json

STATS = "stats/{shard}.json"
"""Counters of a shard, in the stage's folder; written after its other outputs."""


REDO = "delete the file to process its shard again"
"""The fix for a bad file that marks a finished shard."""
Counters = dict[str, Count | dict[str, Count | dict[str, Count]]]
"""The schema of any shard's counters: numbers by name, possibly nested."""


def stats_path(out: Path, shard: str) -> Path:
    """The file with a finished shard's counters, in its stage's folder."""
    return out / "stats" / f"{shard}.json"


def sum_stats(out: Path, shards: Sequence[str], kind: Any = Counters) -> dict[str, Any]:
    """Add up the counters of finished shards, nested dictionaries key by key, keys sorted; one shard in memory.

    Args:
        kind: their schema; every shard must have the counters that it names.

    Raises:
        UserError: a shard's counters are missing or damaged.
    """
    total: dict[str, Any] = {}
    for name in shards:
        path = stats_path(out, name)
        try:
            _add(total, read_fields(path, kind, cure=REDO))
        except (TypeError, AttributeError):  # a number in one shard, a dictionary in another
            raise UserError(f"{path}: has other counters than the shards before it; {REDO}") from None
    return total


def sum_kept(out: Path, shards: Sequence[str], kept: str, kind: Any = Counters) -> dict[str, Any]:
    """Like :func:`sum_stats`, for work that must keep something.

    Args:
        kept: name of the counter of what was kept.

    Raises:
        UserError: it is 0; the message has the reasons why everything was dropped.
    """
    total = sum_stats(out, shards, kind)
    if not total.get(kept):
        drops = sorted(total.get("drops", {}).items(), key=lambda drop: (-drop[1], drop[0]))
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in drops if count) or "the input is empty"
        raise UserError(f"{out}: nothing was kept ({kept} 0): {reasons}")
    return total


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    for key in sorted(more):
        if isinstance(more[key], dict):
            _add(total.setdefault(key, {}), more[key])
        else:
            total[key] = total.get(key, 0) + more[key]


def open_folder(out: Path, file: str, settings: Mapping[str, Any], shards: Sequence[str]) -> None:
    """Record ``settings`` and the shards in ``out/file``, or check that they match those recorded before.

    Shards may be added, but finished shards may not disappear.

    Raises:
        UserError: the folder was made with other settings, or a finished shard is no longer among ``shards``.
    """
    path = out / file
    if path.is_file():
        before = read_json(path, dict[str, Any], cure="delete the folder, or name another")
        finished = as_type(before.pop("shards", None), list[str], f"{path}: $.shards")
        changed = [key for key in {**settings, **before} if before.get(key) != settings.get(key)]
        if changed:
            raise UserError(
                f"{path}: this folder was made with another {', '.join(changed)}; name another folder or delete it"
            )
        listed = set(shards)
        gone = [name for name in finished if name not in listed and stats_path(out, name).is_file()]
        if gone:
            raise UserError(
                f"{path}: {len(gone)} finished shards are missing from the input, the first is {gone[0]!r}; "
                f"put them back, or delete {stats_path(out, gone[0])} and {out / gone[0]}.* to continue without"
            )
    write_json(path, {**settings, "shards": list(shards)})
