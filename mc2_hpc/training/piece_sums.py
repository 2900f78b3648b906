"""Sums over the ranks of which every rank gets its own piece.

A ring that reduces in bf16 rounds at every rank, and a number of 8 bits stops growing once it is 256 times what is
added: at hundreds of ranks that is an error of per cents (docs/step.md). So what travels in bf16 is exchanged here
rather than reduced (:class:`NodeExchange`): every rank receives the others' parts of its piece and adds them up in
fp32. First the ranks of each node do so with each other, and then, with the sums of the nodes rounded once more, each
rank with those in its place on the other nodes. A rank sends no more bytes than in a ring, and across nodes only the
piece that it has of its node's sum.
"""

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mc2_hpc.distributed import Ranks

_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # torch 2.13's name, and the older


class Summing(Protocol):
    """A sum that has been started. On a GPU, the stream waits for messages and the host never does."""

    def advance(self) -> None:
        """Start what depends on earlier messages. Collective."""

    def piece(self) -> Tensor:
        """This rank's piece of the sum, in fp32. After :meth:`advance`."""


class ReduceScatter:
    """A sum in the type of what is summed."""

    def __init__(self, whole: Tensor) -> None:
        """Start. Collective.

        Args:
            whole: flat, a piece for each rank in order.
        """
        self._whole = whole  # has to outlive the message
        self._piece = whole.new_empty(len(whole) // dist.get_world_size())
        self._work = _reduce_scatter(self._piece, whole, async_op=True)

    def advance(self) -> None:
        """Nothing: there is one message."""

    def piece(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._piece.float()


class NodeExchange:
    """Which ranks exchange parts with each other: all, or first those of a node and then those across nodes."""

    def __init__(self, ranks: Ranks) -> None:
        """Make process groups where the ranks are on several nodes. Collective."""
        self.nodes, self.per_node = ranks.world_size // ranks.per_node, ranks.per_node
        self.within: dist.ProcessGroup | None = None
        """The ranks of this node, if the sum has two levels."""
        self.between: dist.ProcessGroup | None = None
        """The ranks in this one's place on all nodes; ``None`` is all ranks."""
        if self.nodes > 1 and self.per_node > 1:
            of_nodes = torch.arange(ranks.world_size).view(self.nodes, self.per_node)
            timeout = timedelta(seconds=ranks.timeout_s)
            self.within, _ = dist.new_subgroups_by_enumeration(of_nodes.tolist(), timeout=timeout)
            self.between, _ = dist.new_subgroups_by_enumeration(of_nodes.T.tolist(), timeout=timeout)

    def start(self, whole: Tensor) -> Summing:
        """Start to sum, in messages of the type of ``whole``, which is as for :class:`ReduceScatter`. Collective."""
        return _ExchangedSum(self, whole)


class _ExchangedSum:
    def __init__(self, exchange: NodeExchange, whole: Tensor) -> None:
        self._exchange = exchange
        self._first: _Parts | None = None
        self._last: _Parts | None = None
        if exchange.within is None:
            self._last = _Parts(whole, dist.get_world_size(), exchange.between)
            return
        by_place = whole.view(exchange.nodes, exchange.per_node, -1).transpose(0, 1).reshape(-1)
        self._first = _Parts(by_place, exchange.per_node, exchange.within)

    def advance(self) -> None:
        if self._first is not None:
            of_node = self._first.sum(self._first.dtype)
            self._first = None
            self._last = _Parts(of_node, self._exchange.nodes, self._exchange.between)

    def piece(self) -> Tensor:
        assert self._last is not None
        return self._last.sum(torch.float32)


class _Parts:
    """An all-to-all of equal parts."""

    def __init__(self, sent: Tensor, ranks: int, group: "dist.ProcessGroup | None") -> None:
        self.dtype = sent.dtype
        self._sent = sent  # has to outlive the message
        self._received = torch.empty_like(sent).view(ranks, -1)
        self._work = dist.all_to_all_single(self._received.view(-1), sent, group=group, async_op=True)

    def sum(self, dtype: torch.dtype) -> Tensor:
        """Of what arrived, added up in fp32 in the order of ranks, so that a run can be repeated bit for bit."""
        if self._work is not None:
            self._work.wait()
        return self._received.sum(0, dtype=dtype)
