"""Counts every operator that a step dispatches: flops, bytes through memory, collectives and live memory.

The same mode counts real tensors and fake ones, so a trace can be compared with the step it stands for.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from mc2_hpc.planning.allocations import Allocations
from mc2_hpc.planning.records import Collective, Work

_aten = torch.ops.aten

_KINDS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "allgather_coalesced_": "all-gather",
    "gather_": "gather",
    "scatter_": "scatter",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "recv_": "receive",
}
_INPUT_KINDS = ("reduce-scatter", "all-to-all", "scatter", "gather")
"""Their bytes are those of the second argument, the input; of the others, the first's."""


class Counting(TorchDispatchMode):
    """The mode. :attr:`allocations` has the memory; :meth:`work` and :meth:`collectives` have the rest."""

    def __init__(self, *, gloo: bool) -> None:
        """
        Args:
            gloo: whether collectives are gloo's, whose reduce-scatter works on a copy of its whole input.
        """
        super().__init__()
        self.allocations = Allocations()
        self._gloo = gloo
        self._work: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self._messages: dict[tuple[str, str, str, bool], list[int]] = defaultdict(lambda: [0, 0])
        self.attended = 0.0
        """Keys per query in attention within packed captions, for kernels whose flops depend on it."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is dispatched inside belongs to this phase of the step."""
        before = self.allocations.phase
        self.allocations.enter(name)
        try:
            yield
        finally:
            self.allocations.enter(before)

    def begin(self) -> None:
        """Start counting a step anew."""
        self._work.clear()
        self._messages.clear()
        self.allocations.begin()

    def work(self) -> dict[str, Work]:
        """By ``<phase>/<class>``."""
        return {
            f"{phase}/{kernels}": Work(flops=flops, bytes=size, launches=launches)
            for (phase, kernels), (flops, size, launches) in sorted(self._work.items())
        }

    def collectives(self) -> tuple[Collective, ...]:
        """All messages since :meth:`begin`."""
        return tuple(
            Collective(kind=kind, phase=phase, group=group, host=host, calls=calls, bytes=size)
            for (phase, kind, group, host), (calls, size) in sorted(self._messages.items())
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self.call(func, args, kwargs)
        self.count(func, args, kwargs, result)
        return result

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operator."""
        return func(*args, **kwargs)

    def is_counted(self, tensor: Tensor) -> bool:
        """Whether a tensor is in the memory that is counted."""
        return tensor.device.type != "meta"  # DeepSpeed notes shapes in meta tensors

    def count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count an operator that has run."""
        if func.namespace == "c10d":
            self._count_message(func, args)
            return
        outputs = [leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor) and self.is_counted(leaf)]
        self.allocations.see(outputs)
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor) and self.is_counted(leaf)]
        if func.is_view or not (outputs or inputs) or _moves_nothing(func):
            return
        self.add(
            _class_of(func),
            flops=self._flops(func, args, kwargs, result),
            size=_bytes(inputs) + _bytes(_new(outputs, inputs)) + _written(func, args),
        )

    def _flops(self, func: Any, args: Any, kwargs: Any, result: Any) -> float:
        if func._opname in _VARLEN_PRODUCTS:  # PyTorch's formula reads the lengths of captions from the device
            query = args[_VARLEN_QUERY[func._opname]]
            return 2.0 * _VARLEN_PRODUCTS[func._opname] * query.numel() * self.attended
        flops = flop_registry.get(func._overloadpacket)
        if flops is None:
            return 0
        # The formulas do not know the argument for the type of a product.
        return flops(*(each for each in args if not isinstance(each, torch.dtype)), **kwargs, out_val=result)

    def add(self, kernels: str, *, flops: float, size: float) -> None:
        """Count one kernel of a class in the current phase."""
        entry = self._work[self.allocations.phase, kernels]
        entry[0] += flops
        entry[1] += size
        entry[2] += 1

    def _count_message(self, func: Any, args: Any) -> None:
        kind = _KINDS.get(func._opname)
        if kind is None:
            return  # a barrier
        buffers = list(_tensors(args[1] if kind in _INPUT_KINDS and len(args) > 1 else args[0]))
        size = _bytes(buffers)
        counted = all(self.is_counted(tensor) for tensor in buffers)
        entry = self._messages[self.allocations.phase, kind, _group_of(args), not counted]
        entry[0] += 1
        entry[1] += size
        if counted:
            if self.allocations.phase != "loss":
                self.allocations.mark(_tensors(args[:2]), "communication buffers", unless_known=True)
            self.allocations.see((), extra=size if kind == "reduce-scatter" and self._gloo else 0)


def _group_of(args: Any) -> str:
    """:attr:`mc2_hpc.planning.records.Collective.group` of a message."""
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
    ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed))
    if len(ranks) == dist.get_world_size():
        return "all"
    return "node" if ranks[-1] - ranks[0] == len(ranks) - 1 else "between"


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor))


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _new(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs that are not inputs too, as those of in-place operators are."""
    known = {id(tensor) for tensor in inputs}
    return [tensor for tensor in outputs if id(tensor) not in known]


def _written(func: Any, args: Any) -> int:
    """Bytes of the inputs that an operator writes back."""
    return sum(
        _bytes(list(_tensors(value)))
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


_FREE = {
    _aten.empty,
    _aten.empty_like,
    _aten.new_empty,
    _aten.empty_strided,
    _aten.new_empty_strided,
    _aten._local_scalar_dense,
    _aten.lift_fresh,
    _aten._unsafe_view,
    _aten.set_,
    _aten.resize_,
    _aten.record_stream,
}
_VARLEN_PRODUCTS = {"_varlen_attn": 2, "_varlen_attn_backward": 5}
"""Products of (tokens, width) with keys or values; backward computes the scores again."""
_VARLEN_QUERY = {"_varlen_attn": 0, "_varlen_attn_backward": 1}
_ATTENTION = ("scaled_dot_product", "varlen", "flash_attn", "efficient_attention")
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.matmul, _aten.linear, _aten.addmv, _aten.mv}
_OPTIMIZER = {_aten._fused_adamw_, _aten._fused_adam_}


def _moves_nothing(func: Any) -> bool:
    return func._overloadpacket in _FREE


def _class_of(func: Any) -> str:
    packet = func._overloadpacket
    if packet in _PRODUCTS:
        return "products"
    if packet in _OPTIMIZER:
        return "optimizer"
    return "attention" if any(mark in func._opname for mark in _ATTENTION) else "other"
