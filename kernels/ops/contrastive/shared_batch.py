"""The ranks that share a batch, and the few collectives that the loss needs.

Each is one call on one contiguous buffer, whatever the number of ranks; on a GPU none makes the host wait. Sums over
ranks are the collective library's: gloo and NCCL add in an order that depends on sizes and on how ranks are connected,
not on timing. Every wait is bounded by the process group's own timeout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate as running_sum

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 renamed them and deprecated the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

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
    def longest(self) -> int:
        """The largest number of pairs on a rank."""
        return max(self.batches)

    @cached_property
    def is_even(self) -> bool:
        """Whether all ranks have the same number of pairs."""
        return min(self.batches) == self.longest

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
        """The sum of a small tensor of every rank, with the same bits on every rank."""
        if self.size == 1:
            return local
        every = local.new_empty((self.size, *local.shape))
        _all_gather(every, local[None], group=self.group)
        return every.sum(0)

    def reduce_(self, whole: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        """Reduce a tensor over ranks in place; returns it, equal on every rank."""
        dist.all_reduce(whole, op=operation, group=self.group)
        return whole

    def sum_to_owners(self, partial: Tensor) -> Tensor:
        """The sum over ranks of (N, ...) rows; returns the rows (b, ...) that this rank owns."""
        padded = partial.contiguous()
        if not self.is_even:
            padded = partial.new_zeros((self.size * self.longest, *partial.shape[1:]))
            padded.index_copy_(0, self.padded_rows(partial.device), partial)
        own = partial.new_empty((self.longest, *partial.shape[1:]))
        _reduce_scatter(own, padded, group=self.group)
        return own[: self.batches[self.rank]]

    def padded_rows(self, device: torch.device) -> Tensor:
        """(N,) the place of each row if every rank's rows are padded to the longest's."""
        return _padded_rows(self.batches, device)


@lru_cache(maxsize=8)
def _padded_rows(batches: tuple[int, ...], device: torch.device) -> Tensor:
    # Cached, because the upload is only worth making once.
    longest, counts = max(batches), torch.tensor(batches)
    before = torch.arange(len(batches)) * longest - (counts.cumsum(0) - counts)
    rows = torch.arange(sum(batches)) + before.repeat_interleave(counts)
    return rows.to(device)


class Gather:
    """An all-gather in progress; ranks may hold different numbers of rows."""

    def __init__(self, shared: SharedBatch, local: Tensor) -> None:
        self._shared = shared
        longest = shared.longest
        padded = local.contiguous()
        if len(local) < longest:
            padded = local.new_zeros((longest, *local.shape[1:]))
            padded[: len(local)] = local
        self._padded = padded  # kept alive until it is sent
        self._every = local.new_empty((shared.size * longest, *local.shape[1:]))
        self._work = _all_gather(self._every, padded, group=shared.group, async_op=True)

    def wait(self) -> Tensor:
        """(N, ...) the rows of all ranks."""
        self._work.wait()
        if self._shared.is_even:
            return self._every
        return self._every.index_select(0, self._shared.padded_rows(self._every.device))


def share_batch(
    features: Tensor, group: dist.ProcessGroup | None, batches: Sequence[int] | None, teacher_width: int = 0
) -> SharedBatch:
    """The ranks of ``group`` and their batch sizes; exchanges the sizes unless ``batches`` gives them.

    Raises ``ValueError`` if there are no pairs, or ``batches`` does not fit the group or these features; and, where
    sizes are exchanged, on every rank if features differ in width or type.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        size, rank = 1, 0
    else:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the group passed to contrastive_loss: pass one that it belongs to")
    if batches is None:
        batches = (len(features),) if size == 1 else _exchange(features, group, size, teacher_width)
    elif len(batches) != size or batches[rank] != len(features):
        raise ValueError(
            f"batches={_shown(batches)} does not fit rank {rank} of {size} with {len(features)} pairs: "
            f"give the pairs of every rank, in order"
        )
    shared = SharedBatch(group, rank, tuple(batches))
    if shared.global_batch == 0:
        raise ValueError("the contrastive loss received no pairs on any rank: pass at least one")
    return shared


def _exchange(features: Tensor, group: dist.ProcessGroup | None, size: int, teacher_width: int) -> tuple[int, ...]:
    """Every rank's number of pairs; on a GPU, waits for the features."""
    mine = torch.tensor([*features.shape, teacher_width, _DTYPES.index(features.dtype)], device=features.device)
    every = mine.new_empty((size, len(mine)))
    _all_gather(every, mine[None], group=group)
    batches, widths, teacher_widths, types = zip(*every.tolist(), strict=True)
    _require_same("feature widths", widths)
    _require_same("widths of a teacher's features", teacher_widths)
    _require_same("feature types", [_DTYPES[index] for index in types])
    return batches


def _shown(batches: Sequence[int]) -> str:
    """The sizes, or the first eight of many."""
    return str(list(batches)) if len(batches) <= 8 else f"[{', '.join(map(str, batches[:8]))}, ...]"


def _require_same(what: str, values: Sequence[object]) -> None:
    if len(set(values)) > 1:
        raise ValueError(f"ranks hold different {what}: {list(values)}; pass features of the same kind on every rank")
