"""Gradients of ZeRO 1 and 2 summed by reduce-scatter while backward runs, in place of DeepSpeed's all-reduce.

DeepSpeed (0.19) all-reduces whole buckets at these stages and keeps its own part of the result: a ring then moves twice
what is needed. Its partitions are why: each of its parameter groups is laid out flat and cut into one piece per rank,
so a bucket of neighbouring parameters belongs to a few ranks. Here every bucket is a parameter group of its own
(:func:`in_buckets`). Its flat gradient is cut exactly as DeepSpeed cuts its weights, so one reduce-scatter, or the
exchange that stands for it in bf16 (:mod:`mc2_hpc.training.piece_sums`), gives each rank the sums of its piece, and
DeepSpeed's step takes them from there: its norm, clipping, update and gather are its own. It has no public way to be
given gradients, hence the attribute names of its optimizer here.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mc2_hpc.distributed import Ranks
from mc2_hpc.training.piece_sums import NodeExchange, ReduceScatter, Summing


def in_buckets(
    groups: Sequence[dict[str, Any]], *, largest: int | None = None, apart: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Parameter groups divided into groups of the same settings.

    Args:
        largest: elements of a group, unless a single parameter has more; ``None`` does not limit them.
        apart: parameters that share no group with others.
    """
    kept_apart = set(apart)
    return [
        {**group, "params": params}
        for group in groups
        for separate in (True, False)
        for params in _pieces([each for each in group["params"] if (each in kept_apart) is separate], largest)
    ]


def _pieces(parameters: Sequence[nn.Parameter], largest: int | None) -> Iterator[list[nn.Parameter]]:
    piece: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if piece and largest is not None and size + parameter.numel() > largest:
            yield piece
            piece, size = [], 0
        piece.append(parameter)
        size += parameter.numel()
    if piece:
        yield piece


@dataclass(kw_only=True)
class _Bucket:
    """One parameter group of DeepSpeed's."""

    group: int
    """Its number."""
    parameters: list[nn.Parameter]
    offsets: list[int]
    """Of each parameter in the flat group, in elements."""
    size: int
    """Elements of the flat group, with the padding at its end."""
    missing: int = 0
    """Gradients that this pass has not computed yet."""
    sums: Tensor | None = None
    """This rank's piece of the averaged gradient so far, flat, in fp32."""


class GradientScatter:
    """Averages gradients over the ranks. A pass is :meth:`begin`, backward, :meth:`finish`, on all ranks alike."""

    def __init__(
        self,
        optimizer: Any,
        parameters: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
        ranks: Ranks,
        *,
        every_pass: bool,
    ) -> None:
        """
        Args:
            optimizer: DeepSpeed's of ZeRO stage 1, which is not to reduce gradients itself.
            parameters: of the module, in the order of the forward pass.
            dtype: that gradients travel in, once they have been added up over the micro-batches that are not reduced
                on their own. Sums are in fp32.
            every_pass: reduce after every micro-batch, so that no rank keeps whole gradients, and add up the sums of
                this rank's piece in fp32. Otherwise gradients add up whole, on their parameters, until the last one.
        """
        self._optimizer, self._dtype, self._every_pass = optimizer, dtype, every_pass
        self._world_size = ranks.world_size
        self._start_sum: Callable[[Tensor], Summing] = (
            ReduceScatter if dtype == torch.float32 else NodeExchange(ranks).start
        )
        places = {parameter: place for place, parameter in enumerate(parameters.values())}
        buckets = [
            _Bucket(group=group, parameters=list(members), offsets=offsets, size=flat.numel())
            for group, (members, offsets, flat) in enumerate(
                zip(
                    optimizer.round_robin_bit16_groups,
                    optimizer.round_robin_bit16_offsets,
                    optimizer.bit16_groups_flat,
                    strict=True,
                )
            )
        ]
        # Backward computes them from the last parameter to the first. A fixed order, because all ranks have to start
        # the same messages in the same order, whatever order their gradients come in.
        self._buckets = sorted(buckets, key=lambda bucket: -min(places[each] for each in bucket.parameters))
        self._reduces = False
        self._started = 0
        self._running: list[tuple[_Bucket, Summing]] = []
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._counter(bucket))

    def begin(self, *, last: bool) -> None:
        """Before backward of a micro-batch, the step's ``last`` or not."""
        self._reduces = last or self._every_pass
        self._started = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def _counter(self, bucket: _Bucket) -> Callable[[nn.Parameter], None]:
        def count(_: nn.Parameter) -> None:
            bucket.missing -= 1
            if self._reduces:
                self._start_complete()

        return count

    def _start_complete(self) -> None:
        while self._started < len(self._buckets) and self._buckets[self._started].missing <= 0:
            self._start(self._buckets[self._started])
            self._started += 1

    @torch.no_grad()
    def _start(self, bucket: _Bucket) -> None:
        """Start to sum a bucket, and free its gradients."""
        like = bucket.parameters[0]
        whole = torch.empty(bucket.size, dtype=self._dtype, device=like.device)
        grads, views = [], []
        for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=True):
            view = whole.narrow(0, offset, parameter.numel()).view(parameter.shape)
            if parameter.grad is None:  # the pass had no use for it
                view.zero_()
                continue
            grads.append(parameter.grad)
            views.append(view)
            parameter.grad = None
        used = bucket.offsets[-1] + bucket.parameters[-1].numel()
        whole[used:].zero_()
        torch._foreach_copy_(views, grads)
        summing = self._start_sum(whole)
        if self._running:
            # Its first message has had the time of a bucket's backward pass to arrive.
            self._running[-1][1].advance()
        self._running.append((bucket, summing))

    def finish(self, *, last: bool) -> None:
        """After backward: let the device wait for the sums, and after the ``last`` micro-batch give them to DeepSpeed.

        The host waits for nothing on a GPU.
        """
        if not self._reduces:
            return
        self._reduces = False
        for bucket in self._buckets[self._started :]:
            self._start(bucket)
        if self._running:
            self._running[-1][1].advance()
        for bucket, summing in self._running:
            sums = summing.piece().div_(self._world_size)
            bucket.sums = sums if bucket.sums is None else bucket.sums.add_(sums)
        self._running = []
        if last:
            for bucket in self._buckets:
                self._optimizer.averaged_gradients[bucket.group] = _Flat(bucket.sums)
                bucket.sums = None


class _Flat(list[Tensor]):
    """Gradients of a group as DeepSpeed's step takes them without a copy: a list, and the flat whole of it."""

    def __init__(self, flat_partition: Tensor | None) -> None:
        assert flat_partition is not None
        super().__init__([flat_partition])
        self.flat_partition = flat_partition
