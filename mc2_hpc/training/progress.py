"""How far a run has come: the part of its state that is neither weights nor moments."""

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
    """Run-time state of one rank that a checkpoint carries."""

    step: int = 0
    samples_seen: int = 0
    """Pairs, over all ranks."""
    position: dict[int, Position] = field(default_factory=dict)
    """Of the lanes this rank has read from."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Samples this rank skipped, by reason."""

    def gathered(self) -> dict[str, Any]:
        """The same over all ranks, as ``trainer.json`` holds it. Collective."""
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
    """Progress to continue from, and the position of every lane for the loader (``None``: from the start)."""
    if checkpoint is None:
        return Progress(), None
    saved = checkpoint.trainer
    progress = Progress(
        step=checkpoint.step,
        samples_seen=int(saved["samples_seen"]),
        # The sum over ranks goes on from the first one's count.
        skipped=Counter(saved["skipped"]) if is_first else Counter(),
    )
    return progress, {lane: Position(*p) for lane, p in enumerate(saved["position"])}


def common_shards(names: Sequence[str]) -> dict[str, Any]:
    """How many shards there are and the SHA-256 of their names, as ``trainer.json`` holds it. Collective.

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
                f"rank 0: let all nodes see the same folder, and wait until what was written shows everywhere"
            )
    return own


def warn_of_other_shards(checkpoint: Checkpoint, shards: dict[str, Any]) -> None:
    """Say loudly that the order of samples does not continue, because shards came or went since the checkpoint."""
    before = checkpoint.trainer.get("shards")
    if before is not None and before != shards:
        logger.warning(
            "%s was saved with %d shards, now there are %d of other names: the order of samples changes from here on, "
            "and in this epoch some may come twice or not at all",
            checkpoint.folder,
            before["count"],
            shards["count"],
        )
