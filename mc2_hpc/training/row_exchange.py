"""Which rank owns which row of the token table, and the exchange of the rows and gradients that a batch uses.

Rows are dealt to the ranks in turn. Token ids are ordered by frequency, so ranges of rows would give the first rank
nearly all the traffic: at 384 ranks it would own every common token, and each rank asks for most of those.

Ids and counts are exchanged on the host, from the token batch before it is copied to the device. So the splits of the
device's all-to-all are known without waiting for the device.

Shape suffixes: U unique ids of this rank's batch, A rows that all ranks ask this one for, T different rows among them,
K rows per rank, V vocabulary, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mc2_hpc.distributed import Ranks

_SLAB_BYTES = 1 << 29
"""Most bytes that one collective of :meth:`RowExchange.gather` moves to a rank."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The place of every row: row ``id`` is row ``id // world_size`` of rank ``id % world_size``."""

    vocab_size: int
    world_size: int

    @property
    def rows_per_rank(self) -> int:
        """K, the same on every rank: the last rows of some ranks are padding."""
        return -(-self.vocab_size // self.world_size)

    def places(self, ids: Tensor) -> Tensor:
        """Positions of rows in the concatenation of all ranks' rows."""
        if self.world_size == 1:
            return ids
        return ids % self.world_size * self.rows_per_rank + ids // self.world_size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one step exchanges. Tensors are on the device unless the name says otherwise."""

    places_U: Tensor
    """Sorted places of the ids in this rank's batch."""
    asked_A: Tensor
    """This rank's rows that the ranks ask for, in the order of ranks."""
    num_sent: list[int]
    """How many of ``asked_A`` each rank asked for."""
    num_received: list[int]
    """How many of ``places_U`` each rank owns."""
    touched_T: Tensor
    """Sorted different rows among ``asked_A``: those that get a gradient."""
    touched_on_host_T: Tensor
    order_A: Tensor
    """Positions in ``asked_A`` sorted by row, those of one row in the order of ranks."""
    starts_T: Tensor
    """Where in ``order_A`` each row of ``touched_T`` starts."""


class RowExchange:
    """The communication of one token table. All methods are collective; on one rank nothing is communicated."""

    def __init__(self, vocab_size: int, ranks: Ranks) -> None:
        self.layout = Layout(vocab_size=vocab_size, world_size=ranks.world_size)
        self._ranks = ranks
        self._host_group: dist.ProcessGroup | None = None
        if ranks.world_size > 1 and ranks.device.type != "cpu":
            self._host_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=ranks.timeout_s))

    def plan(self, ids: Tensor) -> Plan:
        """Plan a step for this rank's token ids, of any shape, on the host."""
        places_U = self.layout.places(ids.unique()).sort().values
        world_size, rows_per_rank = self._ranks.world_size, self.layout.rows_per_rank
        asked_A, num_sent, num_received = places_U, [len(places_U)], [len(places_U)]
        if world_size > 1:
            received = torch.bincount(places_U // rows_per_rank, minlength=world_size)
            sent = torch.empty_like(received)
            dist.all_to_all_single(sent, received, group=self._host_group)
            num_sent, num_received = sent.tolist(), received.tolist()
            asked_A = places_U.new_empty(sum(num_sent))
            dist.all_to_all_single(asked_A, places_U % rows_per_rank, num_sent, num_received, group=self._host_group)
        touched_T, slots_A, counts_T = asked_A.unique(return_inverse=True, return_counts=True)
        places, asked, touched, order, starts = self._to_device(
            places_U, asked_A, touched_T, slots_A.argsort(stable=True), counts_T.cumsum(0) - counts_T
        )
        return Plan(
            places_U=places,
            asked_A=asked,
            num_sent=num_sent,
            num_received=num_received,
            touched_T=touched,
            touched_on_host_T=touched_T,
            order_A=order,
            starts_T=starts,
        )

    def _to_device(self, *parts: Tensor) -> Sequence[Tensor]:
        """1-d tensors of one type; on a GPU they arrive by one asynchronous copy."""
        if self._ranks.device.type == "cpu":
            return parts
        together = torch.cat(parts).pin_memory().to(self._ranks.device, non_blocking=True)
        return together.split([len(part) for part in parts])

    def fetch(self, plan: Plan, own_KW: Tensor) -> Tensor:
        """The (U, W) rows that this rank's batch uses, in the order of ``plan.places_U``."""
        asked_AW = own_KW[plan.asked_A]
        if self._ranks.world_size == 1:
            return asked_AW
        rows_UW = own_KW.new_empty(len(plan.places_U), own_KW.shape[1])
        dist.all_to_all_single(rows_UW, asked_AW, plan.num_received, plan.num_sent)
        return rows_UW

    def mean_gradients(self, plan: Plan, grads_UW: Tensor) -> Tensor:
        """The (T, W) gradients of this rank's rows, averaged over ranks: summed in the order of ranks, so that a run
        can be repeated bit for bit."""
        world_size = self._ranks.world_size
        if world_size == 1:
            return grads_UW
        grads_AW = grads_UW.new_empty(len(plan.asked_A), grads_UW.shape[1])
        dist.all_to_all_single(grads_AW, grads_UW / world_size, plan.num_sent, plan.num_received)
        return F.embedding_bag(plan.order_A, grads_AW, plan.starts_T, mode="sum")

    def own_part(self, full_VW: Tensor) -> Tensor:
        """This rank's (K, W) rows of a whole table, as a copy on the device; padding is 0."""
        part = full_VW[self._ranks.rank :: self._ranks.world_size]
        own_KW = torch.zeros(self.layout.rows_per_rank, full_VW.shape[1], device=self._ranks.device)
        own_KW[: len(part)] = part
        return own_KW

    def gather(self, own_KW: Tensor, to: int | None = None) -> Tensor:
        """The whole (V, W) table on rank ``to``, or on all; on the others a table without rows.

        On one rank, ``own_KW`` itself.
        """
        world_size, (num_rows, width) = self._ranks.world_size, own_KW.shape
        if world_size == 1:
            return own_KW
        receives = to is None or to == self._ranks.rank
        full = own_KW.new_empty(num_rows * world_size if receives else 0, width)
        per_slab = max(1, _SLAB_BYTES // (own_KW.element_size() * width * world_size))
        for start in range(0, num_rows, per_slab):
            piece = own_KW[start : start + per_slab]
            parts = piece.new_empty(world_size if receives else 0, *piece.shape)
            if to is None:
                dist.all_gather(list(parts), piece)
            else:
                dist.gather(piece, list(parts) if receives else None, dst=to)
            if receives:
                rows = full[start * world_size : (start + len(piece)) * world_size]
                rows.view(len(piece), world_size, width).copy_(parts.transpose(0, 1))
        return full[: self.layout.vocab_size]
