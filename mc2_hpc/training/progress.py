"""A run's progress: the part of its state that is neither weights nor moments."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from mc2_hpc.data.stream import Position
from mc2_hpc.errors import UserError
from mc2_hpc.training.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Run-time state of one rank that a checkpoint saves."""

    step: int = 0
    samples_seen: int = 0
    """Pairs, over all ranks."""
    position: dict[int, Position] = field(default_factory=dict)
    """By lane, for the lanes that this rank has read from."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Samples that this rank skipped, by reason."""

    def gathered(self) -> dict[str, Any]:
        """The progress of all ranks, in the form of ``trainer.json``. Collective."""
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self.position, dict(self.skipped)))
        lanes: dict[int, Position] = {}
        skipped: Counter[str] = Counter()
        for position, counts in parts:
            lanes |= position
            skipped.update(counts)
        return {
            "samples_seen": self.samples_seen,
            "position": [list(lanes[lane]) for lane in sorted(lanes)],
            "skipped": dict(sorted(skipped.items())),
        }


def restore_progress(checkpoint: Checkpoint | None, *, is_first: bool) -> tuple[Progress, dict[int, Position] | None]:
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
    return progress, {lane: Position(*p) for lane, p in enumerate(saved["position"])}


def common_shards(names: Sequence[str]) -> dict[str, Any]:
    """The number of shards and the SHA-256 of their names, in the form of ``trainer.json``. Collective.

    Raises:
        UserError: the ranks do not see the same shards; their samples would overlap.
    """
    own = {"count": len(names), "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    for rank, found in enumerate(every):
        if found != every[0]:
            raise UserError(
                f"data.train: rank {rank} sees {found['count']} shards, which are not the {every[0]['count']} of "
                f"rank 0: make sure that all nodes see the same folder, and wait until new files are visible everywhere"
            )
    return own


def warn_of_other_shards(checkpoint: Checkpoint, shards: dict[str, Any]) -> None:
    """Warn that the sample order does not continue, because shards were added or removed since the checkpoint."""
    before = checkpoint.trainer.get("shards")
    if before is not None and before != shards:
        logger.warning(
            "%s was saved with %d shards, now there are %d with different names: the order of samples changes from "
            "here on, and in this epoch some may occur twice or not at all",
            checkpoint.folder,
            before["count"],
            shards["count"],
        )
