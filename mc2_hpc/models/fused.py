"""Layer norm and quick-GELU, each behind a table of backends: PyTorch's own operators, one Triton kernel, or apex.

Under autocast PyTorch normalises an fp32 copy of a bf16 input and rounds the result in a third pass, and quick-GELU is
three operators that keep two tensors. The fused kernels read and write each value once, in the input's type, and
compute in fp32 as well: results differ by the rounding of the last place.
"""

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc2_hpc.errors import UserError
from mc2_hpc.kernels.layer_norm import add_layer_norm as triton_add_layer_norm
from mc2_hpc.kernels.layer_norm import layer_norm as triton_layer_norm
from mc2_hpc.kernels.quick_gelu import SLOPE
from mc2_hpc.kernels.quick_gelu import quick_gelu as triton_quick_gelu
from mc2_hpc.kernels.triton_launch import triton_obstacle

logger = logging.getLogger(__name__)
T = TypeVar("T")


class NormFunction(Protocol):
    """Layer norm of (..., W) over its last dimension, with statistics in fp32; (..., W) in the input's type."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor: ...


AddNormFunction = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""The sum of two tensors and its layer norm: (..., W) twice, of (x, added, weight, bias, eps)."""

ActivationFunction = Callable[[Tensor], Tensor]


def torch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PyTorch's layer norm in autocast's precision, returned in the input's: the residual stream keeps its type."""
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(x.dtype)


def torch_quick_gelu(x: Tensor) -> Tensor:
    """Quick-GELU as three of PyTorch's operators."""
    return x * torch.sigmoid(SLOPE * x)


def _load_apex_norm(device_type: str) -> NormFunction:
    try:
        from apex.normalization.fused_layer_norm import mixed_dtype_fused_layer_norm_affine
    except ImportError as error:
        raise UserError(
            f"model.norm=apex: NVIDIA's apex does not load ({error}); build it from source "
            f"(https://github.com/NVIDIA/apex, with APEX_CPP_EXT=1 APEX_CUDA_EXT=1; PyPI's package of this name is a "
            f"different project), or set model.norm=triton"
        ) from None

    def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        # Under autocast apex would round the parameters to the input's type; its kernel takes them as they are, and
        # returns their type.
        with torch.autocast(device_type, enabled=False):
            y: Tensor = mixed_dtype_fused_layer_norm_affine(x, weight, bias, weight.shape, eps)
        return y.to(x.dtype)

    return norm


def _load_triton_norm(device_type: str) -> NormFunction:
    _check_triton("norm", device_type)
    return triton_layer_norm


def _load_triton_quick_gelu(device_type: str) -> ActivationFunction:
    _check_triton("activation", device_type)
    return triton_quick_gelu


def _check_triton(key: str, device_type: str) -> None:
    if obstacle := triton_obstacle(torch.device(device_type)):
        raise UserError(f"model.{key}=triton cannot run: {obstacle}, or set model.{key}=torch")


NORM_BACKENDS: dict[str, Callable[[str], NormFunction]] = {
    "torch": lambda device_type: torch_norm,
    "triton": _load_triton_norm,
    "apex": _load_apex_norm,
}
"""By name, each with a function of the device type that loads it."""

FUSED_WITH_ADDITION: dict[NormFunction, AddNormFunction] = {triton_layer_norm: triton_add_layer_norm}
"""By backend, the one that also adds: to the residual stream, before a norm of it."""

ACTIVATION_BACKENDS: dict[str, Callable[[str], ActivationFunction]] = {
    "torch": lambda device_type: torch_quick_gelu,
    "triton": _load_triton_quick_gelu,
}
"""The same for quick-GELU. Models with GELU use PyTorch's, which is one kernel and keeps only its input."""


def resolve_norm(name: str, device_type: str, *, compiled: bool = False) -> NormFunction:
    """The layer norm that ``model.norm`` names; ``auto`` chooses and logs its choice.

    Args:
        compiled: the blocks are compiled, so the compiler fuses PyTorch's operators; ``auto`` leaves them to it.

    Raises:
        UserError: the backend cannot run here, or the name is unknown.
    """
    return _resolve("norm", NORM_BACKENDS, name, device_type, compiled)


def resolve_activation(name: str, device_type: str, *, compiled: bool = False) -> ActivationFunction:
    """The quick-GELU that ``model.activation`` names, as :func:`resolve_norm` does."""
    return _resolve("activation", ACTIVATION_BACKENDS, name, device_type, compiled)


def _resolve(key: str, table: dict[str, Callable[[str], T]], name: str, device_type: str, compiled: bool) -> T:
    if name == "auto":
        obstacle = "torch.compile fuses it" if compiled else triton_obstacle(torch.device(device_type))
        name = "torch" if obstacle or device_type != "cuda" else "triton"
        logger.info("%s: %s (auto: %s)", key, name, obstacle or f"the default on {device_type}")
    if name not in table:
        raise UserError(f"model.{key}={name!r}: choose one of auto, {', '.join(table)}")
    return table[name](device_type)


class LayerNorm(nn.LayerNorm):
    """Layer norm with fp32 parameters, in the type of its input."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.backend: NormFunction = torch_norm

    @property
    def adds(self) -> bool:
        """Whether the backend can add to its input in the same pass."""
        return self.backend in FUSED_WITH_ADDITION

    def forward(  # type: ignore[override]  # one call for both, because ZeRO 3 fetches parameters around calls
        self, input: Tensor, added: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``input``; or, where :attr:`adds`, the sum of ``input`` and ``added``, and the sum's norm."""
        if added is None:
            return self.backend(input, self.weight, self.bias, self.eps)
        return FUSED_WITH_ADDITION[self.backend](input, added, self.weight, self.bias, self.eps)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the sigmoid approximation of GELU that OpenAI's CLIP uses."""

    def __init__(self) -> None:
        super().__init__()
        self.backend: ActivationFunction = torch_quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.backend(x)
