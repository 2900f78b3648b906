"""A run's progress: the part of its state that is neither weights nor moments."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from mc2_hpc.data.mixing import LanePosition, from_plain, to_plain
from mc2_hpc.data.pools import OpenSource
from mc2_hpc.errors import UserError
from mc2_hpc.training.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Run-time state of one rank that a checkpoint saves."""

    step: int = 0
    samples_seen: int = 0
    """Pairs, over all ranks."""
    position: dict[int, LanePosition] = field(default_factory=dict)
    """By lane, for the lanes that this rank has read from."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Samples that this rank skipped, by reason."""

    def gathered(self) -> dict[str, Any]:
        """The progress of all ranks, in the form of ``trainer.json``. Collective."""
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self.position, dict(self.skipped)))
        lanes: dict[int, LanePosition] = {}
        skipped: Counter[str] = Counter()
        for position, counts in parts:
            lanes |= position
            skipped.update(counts)
        return {
            "samples_seen": self.samples_seen,
            "position": [to_plain(lanes[lane]) for lane in sorted(lanes)],
            "skipped": dict(sorted(skipped.items())),
        }


def restore_progress(
    checkpoint: Checkpoint | None, *, is_first: bool
) -> tuple[Progress, dict[int, LanePosition] | None]:
    """The progress to resume from, and the position of every lane for the loader (``None``: from the start)."""
    if checkpoint is None:
        return Progress(), None
    saved = checkpoint.trainer
    progress = Progress(
        step=checkpoint.step,
        samples_seen=int(saved["samples_seen"]),
        # The first rank's count continues the sum over all ranks.
        skipped=Counter(saved["skipped"]) if is_first else Counter(),
    )
    return progress, {lane: from_plain(place) for lane, place in enumerate(saved["position"])}


def saved_progress(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What :meth:`Progress.gathered` gave when the checkpoint was written; ``None``: at the start of a run."""
    nothing: dict[str, Any] = {"samples_seen": 0, "position": [], "skipped": {}}
    return nothing if checkpoint is None else {key: checkpoint.trainer[key] for key in nothing}


Shards = dict[str, Any]
"""The shards of a run in the form of ``trainer.json``: ``shards``, or ``sources`` with those of each source by name.
Shards are described by their ``count`` and the ``sha256`` of their names."""


def common_shards(sources: Sequence[OpenSource]) -> Shards:
    """The shards that all ranks see. Collective.

    Raises:
        UserError: the ranks do not see the same shards; their samples would overlap.
    """
    own = _described(sources)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    for source in sources:
        for rank, found in enumerate(every):
            here, there = every[0].get(source.name), found.get(source.name)
            if here != there and here is not None and there is not None:
                raise UserError(
                    f"{source.label}: rank {rank} sees {there['count']} shards, which are not the {here['count']} of "
                    f"rank 0: make sure that all nodes see the same folder, and wait until new files are visible "
                    f"everywhere"
                )
    return {"shards": own[""]} if "" in own else {"sources": own}


def _described(sources: Sequence[OpenSource]) -> dict[str, dict[str, Any]]:
    found = {}
    for source in sources:
        digest = hashlib.sha256("\n".join(source.shard_names).encode()).hexdigest()
        found[source.name] = {"count": len(source.shard_names), "sha256": digest}
    return found


def other_shards(trainer: dict[str, Any], sources: Sequence[OpenSource]) -> list[str]:
    """What differs between the shards that ``trainer.json`` describes and those of ``sources``, a line per source that
    both have."""
    before, now = _by_source(trainer), _described(sources)
    return [
        f"was saved with {before[name]['count']} shards{f' of source {name}' if name else ''}, now there are "
        f"{now[name]['count']} with different names"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]


def warn_of_other_shards(checkpoint: Checkpoint, sources: Sequence[OpenSource]) -> None:
    """Warn that the sample order does not continue, because shards were added or removed since the checkpoint."""
    for line in other_shards(checkpoint.trainer, sources):
        logger.warning(
            "%s %s: the order of samples changes from here on, and in this epoch some may occur twice or not at all",
            checkpoint.folder,
            line,
        )


def _by_source(trainer: dict[str, Any]) -> dict[str, Any]:
    single = trainer.get("shards")
    return trainer.get("sources") or ({"": single} if single is not None else {})
