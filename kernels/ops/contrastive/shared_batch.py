"""The ranks that share a batch, and the few collectives that the loss needs.

The rank that owns a result computes its sum over ranks in rank order, so its bits depend neither on the collective
library's algorithm nor on timing. Every wait is bounded by the process group's own timeout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate as running_sum

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 renamed it and deprecated the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class SharedBatch:
    """Which rank holds which pairs: rank k of the group has pairs ``offsets[k]`` to ``offsets[k] + batches[k]``."""

    group: dist.ProcessGroup | None
    rank: int
    batches: tuple[int, ...]
    """Number of pairs on each rank."""

    @property
    def size(self) -> int:
        return len(self.batches)

    @property
    def global_batch(self) -> int:
        return sum(self.batches)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return tuple(running_sum(self.batches[:-1], initial=0))

    def part(self, rank: int) -> slice:
        """The columns of the global batch that a rank owns."""
        return slice(self.offsets[rank], self.offsets[rank] + self.batches[rank])

    def gather(self, local: Tensor) -> "Gather":
        """Start gathering every rank's (b_k, ...) rows, in rank order."""
        return Gather(self, local)

    def sum(self, local: Tensor) -> Tensor:
        """The sum of one scalar per rank, in rank order: the same bits on every rank."""
        if self.size == 1:
            return local
        every = local.new_empty(self.size)
        _all_gather(every, local.reshape(1), group=self.group)
        total = every[0].clone()
        for other in every[1:]:
            total += other
        return total

    def to_owners(self, partial: Tensor) -> Tensor:
        """Send each owner its part of (N, ...) rows; returns the (size, b, ...) parts received, in rank order."""
        own = self.batches[self.rank]
        received = partial.new_empty((self.size * own, *partial.shape[1:]))
        splits = [own] * self.size
        dist.all_to_all_single(received, partial.contiguous(), splits, list(self.batches), group=self.group)
        return received.view(self.size, own, *partial.shape[1:])


class Gather:
    """An all-gather in progress; ranks may hold different numbers of rows."""

    def __init__(self, shared: SharedBatch, local: Tensor) -> None:
        self._shared = shared
        longest = max(shared.batches)
        padded = local.contiguous()
        if len(local) < longest:
            padded = local.new_zeros((longest, *local.shape[1:]))
            padded[: len(local)] = local
        self._padded = padded
        self._every = local.new_empty((shared.size * longest, *local.shape[1:]))
        self._work = _all_gather(self._every, padded, group=shared.group, async_op=True)

    def wait(self) -> Tensor:
        """(N, ...) the rows of all ranks."""
        self._work.wait()
        batches = self._shared.batches
        if min(batches) == max(batches):
            return self._every
        padded = self._every.view(len(batches), max(batches), *self._every.shape[1:])
        return torch.cat([rows[:count] for rows, count in zip(padded, batches, strict=True)])


def discover_batch(features: Tensor, group: dist.ProcessGroup | None) -> SharedBatch:
    """Exchange the ranks' batch sizes, and check that all features have the same width and type.

    Raises ``ValueError`` on every rank if they do not.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return SharedBatch(None, 0, (len(features),))
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the group passed to contrastive_loss: pass one that it belongs to")
    if size == 1:
        return SharedBatch(group, 0, (len(features),))
    mine = torch.tensor([*features.shape, _DTYPES.index(features.dtype)], device=features.device)
    every = mine.new_empty((size, 3))
    _all_gather(every, mine[None], group=group)
    batches, widths, types = zip(*every.tolist(), strict=True)
    _require_same("feature widths", widths)
    _require_same("feature types", [_DTYPES[index] for index in types])
    return SharedBatch(group, rank, batches)


def _require_same(what: str, values: Sequence[object]) -> None:
    if len(set(values)) > 1:
        raise ValueError(f"ranks hold different {what}: {list(values)}; pass features of the same kind on every rank")
