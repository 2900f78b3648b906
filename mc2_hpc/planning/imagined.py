"""A rank of a process group that does not exist, on a device that is not there: what a step is traced in.

Tensors are fake (PyTorch's ``FakeTensorMode``): they have shapes, types and storages, but no memory. Token ids and
other integers that the host reads stay real, because sizes depend on them. Collectives go to PyTorch's fake process
group; the two all-to-alls of token ids between hosts are answered with what the other ranks would send.

A GPU is imagined on top of fake CPU tensors, because a PyTorch without CUDA cannot dispatch CUDA tensors: Python code
sees their device as ``cuda``, so it takes the code paths of GPUs, and the few operators that PyTorch computes otherwise
on a GPU (layer norm under autocast, attention) are replaced by those.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

from mc2_hpc.distributed import Ranks
from mc2_hpc.planning.counting import Counting

GPU = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_aten, _c10d = torch.ops.aten, torch.ops.c10d
_CAPABILITY, _PROCESSORS = (9, 0), 132
"""Compute capability and multiprocessors of the imagined GPU, an H100: kernels choose the sizes of blocks by them."""

HostAnswers = Callable[[Tensor, Tensor], None]
"""Fills the output of an all-to-all between hosts, given its input."""


class Imagining(Counting):
    """Counts while it decides which operators are real."""

    def __init__(self, device: torch.device, fake: FakeTensorMode, answer: HostAnswers) -> None:
        super().__init__(gloo=device.type == "cpu")
        self._on_gpu = device.type == "cuda"
        self._fake, self._answer = fake, answer
        self.for_device = 0
        """Above 0 within a call whose result is on the GPU."""
        self.depth = 0
        """Above 0 within PyTorch's own handling of an operator."""

    def is_counted(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor):
            return tensor.fake_device.type != "meta"
        return not self._on_gpu and super().is_counted(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for by PyTorch itself, as often as anything is called
            return args[0].fake_device
        self.depth += 1
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.depth -= 1

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy of a real host tensor on the imagined device."""
        self.depth += 1
        try:
            fake = self._fake.from_tensor(tensor).clone()
        finally:
            self.depth -= 1
        self.allocations.see([fake])
        return fake

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        is_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if is_fake:
            return self._call_fake(func, args, kwargs)
        if func is _c10d.alltoall_base_.default:
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
                self._answer(args[0], args[1])
            return result
        if self._is_host(tensors, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _is_host(self, tensors: list[Tensor], kwargs: Any) -> bool:
        """Whether an operator without fake inputs is to be computed."""
        if self.for_device:
            return False
        if tensors or self._on_gpu:
            return True
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return not dtype.is_floating_point  # on a CPU, sizes and ids are what the host reads

    def _call_fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _aten._fused_adamw_.default:
            return None  # it is in place, and fake tensors do not know it
        if func is _aten._local_scalar_dense.default:
            dtype = args[0].dtype  # a zero: nothing overflowed, and no norm is large
            return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
        if func is _aten.equal.default:
            return True
        if func in _OUT_PRODUCTS:
            return kwargs["out"]
        return func(*args, **kwargs)


_OUT_PRODUCTS = {_aten.mm.dtype_out, _aten.addmm.dtype_out}
"""Half-precision products with results in fp32, which PyTorch knows on GPUs only."""


class ImaginedGPU(TorchFunctionMode):
    """Shows fake tensors to Python code as tensors on a GPU."""

    def __init__(self, counting: Imagining) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _SET_DATA and not isinstance(args[1], FakeTensor):
            args = (args[0], self._counting.to_device(args[1]))
        if func is Tensor.record_stream:
            return None
        if func is Tensor.pin_memory:
            return args[0]
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            # In autocast's list of fp32 operators for GPUs, but not for CPUs.
            with torch.autocast("cpu", enabled=False):
                return func(args[0].float(), *args[1:], **kwargs)
        if func is torch.device or not _names_gpu(args, kwargs):
            return func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cuda) and not isinstance(args[0], FakeTensor):
            args = (self._counting.to_device(args[0]), *args[1:])
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        self._counting.for_device += 1
        try:
            return func(*args, **kwargs)
        finally:
            self._counting.for_device -= 1


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _is_gpu(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


def _names_gpu(args: Any, kwargs: Any) -> bool:
    return any(_is_gpu(value) for value in (*args, *kwargs.values()))


def _on_cpu(value: Any) -> Any:
    return _CPU if _is_gpu(value) else value


class _Nothing:
    """A stream or an event of the imagined GPU."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: None


def _accelerator() -> Any:
    """DeepSpeed's view of the imagined GPU."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Accelerator(CPU_Accelerator):
        Stream = Event = _Nothing

        def device_name(self, device_index: int | None = None) -> str:
            return "cuda" if device_index is None else f"cuda:{device_index}"

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return "cuda:0"

        def is_synchronized_device(self) -> bool:
            return False

        def on_accelerator(self, tensor: Tensor) -> bool:
            return isinstance(tensor, FakeTensor)

        def stream(self, stream: object) -> Any:
            return contextlib.nullcontext()

        def current_stream(self, device_index: int | None = None) -> _Nothing:
            return _Nothing()

        default_stream = current_stream

        def memory_stats(self, device_index: int | None = None) -> dict[str, int]:
            return {}

        def available_memory(self, device_index: int | None = None) -> int:
            return 1 << 60

        def memory_allocated(self, device_index: int | None = None) -> int:
            return 0

        def communication_backend_name(self) -> str:
            return "nccl"

    return Accelerator()


@contextmanager
def imagined_rank(
    device_type: str, world_size: int, per_node: int, answer: HostAnswers
) -> Iterator[tuple[Ranks, Imagining]]:
    """Be rank 0 of ``world_size``, ``per_node`` on each node, while the context lasts, and count what happens.

    Changes global state of torch and DeepSpeed that cannot be put back: use it in a process of its own.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device = GPU if device_type == "cuda" else _CPU
    os.environ.update(RANK="0", WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    counting = Imagining(device, fake, answer)
    new_group = dist.new_group
    with ExitStack() as stack:
        warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor.*")
        # Parameters are already where they belong, and fake ones cannot be swapped.
        stack.enter_context(patch.object(nn.Module, "_apply", lambda module, *_, **__: module))
        stack.enter_context(patch.object(dist, "new_group", lambda *a, **k: new_group(*a, **{**k, "backend": "fake"})))
        if device.type == "cuda":
            _imagine_gpu(stack)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(fake)
        stack.enter_context(counting)
        if device.type == "cuda":
            stack.enter_context(patch.object(FakeTensor, "device", _shown_device(counting)))
            gpu = stack.enter_context(ImaginedGPU(counting))
            # PyTorch turns the mode off within the functions that it sees, so also within `backward`: there it is
            # turned on again, for the Python code of hooks and custom functions.
            run = torch.autograd._engine_run_backward
            stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", _within(gpu, run)))
        per_node = min(per_node, world_size)
        regular = per_node if world_size % per_node == 0 else 1
        yield Ranks(rank=0, world_size=world_size, local_rank=0, device=device, per_node=regular), counting


def _shown_device(counting: Imagining) -> property:
    """The device of fake tensors as Python code outside PyTorch's own handling of operators sees it."""

    def device(tensor: FakeTensor) -> torch.device:
        if tensor.fake_mode.in_kernel_invocation:
            return torch.device("meta")
        is_seen = counting.depth == 0 and tensor.fake_device.type == "cpu"
        return GPU if is_seen else tensor.fake_device

    return property(device)


def _within(mode: ImaginedGPU, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    return run


def _imagine_gpu(stack: ExitStack) -> None:
    import deepspeed
    from deepspeed.accelerator import set_accelerator

    set_accelerator(_accelerator())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as the engine does on a CPU
    from deepspeed.runtime.zero import partitioned_param_coordinator

    # It compares numbers that all ranks read back from the device.
    name = "assert_ints_same_as_other_ranks"
    stack.enter_context(patch.object(partitioned_param_coordinator, name, lambda *_: None))
    autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    def autocast_on_cpu(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return autocast("cpu", *args, **kwargs)

    stack.enter_context(patch.object(torch, "autocast", autocast_on_cpu))
    stack.enter_context(patch.object(torch.amp, "autocast", autocast_on_cpu))  # for recomputation
    stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *_: enabled("cpu")))
    stack.enter_context(patch.object(torch, "get_autocast_dtype", lambda *_: dtype("cpu")))
    stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: _CAPABILITY))
    properties = SimpleNamespace(multi_processor_count=_PROCESSORS)
    stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda *_: properties))
