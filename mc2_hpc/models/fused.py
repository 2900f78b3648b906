"""Layer norm and quick-GELU, each behind a table of backends: PyTorch's own operators, one Triton kernel, or apex.

Under autocast PyTorch normalises an fp32 copy of a bf16 input and rounds the result in a third pass, and quick-GELU is
three operators that keep two tensors. The fused kernels read and write each value once, in the input's type, and
compute in fp32 as well: results differ by the rounding of the last place.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc2_hpc.errors import UserError
from mc2_hpc.kernels.layer_norm import MOST_FUSED_COLUMNS, add_norm_linear
from mc2_hpc.kernels.layer_norm import add_layer_norm as triton_add_layer_norm
from mc2_hpc.kernels.layer_norm import layer_norm as triton_layer_norm
from mc2_hpc.kernels.linear import with_bias_gradient
from mc2_hpc.kernels.quick_gelu import SLOPE, quick_gelu_linear
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


@dataclass(frozen=True)
class Product:
    """The result of a linear layer, with the bias whose gradient is left to whoever computes that of the result.

    That gradient is the sum of the result's over rows, and the kernel that computes it has all of them at hand.
    """

    value: Tensor | None
    """(..., W); ``None`` before the first block, where nothing is to be added yet."""
    bias: Tensor | None
    """(W,), already in ``value``: a view, because with ZeRO 3 the parameter itself is there during its layer's call
    only. ``None`` if its gradient is computed already."""

    def added_to(self, x: Tensor) -> Tensor:
        """The sum with ``x``, (..., W)."""
        return x if self.value is None else x + with_bias_gradient(self.value, self.bias)


LinearCall = Callable[[Callable[..., tuple[Tensor, Tensor]]], Any]
"""Calls a linear layer that computes its product with the function that it gets."""


class LayerNorm(nn.LayerNorm):
    """Layer norm with fp32 parameters, in the type of its input."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.backend: NormFunction = torch_norm

    @property
    def adds(self) -> bool:
        """Whether the backend can add to its input in the same pass."""
        return self.backend in FUSED_WITH_ADDITION

    @property
    def fuses(self) -> bool:
        """Whether the addition and the norm can be part of the linear layer that follows (:meth:`then`)."""
        return self.backend is triton_layer_norm and self.normalized_shape[0] <= MOST_FUSED_COLUMNS

    def forward(  # one call for all, because ZeRO 3 fetches parameters around calls
        self, input: Tensor, added: Tensor | None = None, linear: LinearCall | None = None
    ) -> Any:
        """The norm of ``input``; or, where :attr:`adds`, the sum of ``input`` and ``added``, and the sum's norm.

        Args:
            linear: compute this, with the fused function that it gets, in place of the norm.
        """
        if linear is not None:
            return linear(
                functools.partial(add_norm_linear, norm_weight=self.weight, norm_bias=self.bias, eps=self.eps)
            )
        if added is None:
            return self.backend(input, self.weight, self.bias, self.eps)
        return FUSED_WITH_ADDITION[self.backend](input, added, self.weight, self.bias, self.eps)

    def then(
        self, linear: nn.Linear, x: Tensor, pending: Product, *, bias_elsewhere: bool, recompute: bool
    ) -> tuple[Tensor, Product]:
        """The sum of ``x`` and what is pending, and a linear layer of the sum's norm, where the layer :attr:`fuses`.

        Args:
            bias_elsewhere: leave the gradient of the layer's bias to whoever has the gradient of the result.
            recompute: compute the norm again in the backward pass.
        """

        def call(fused: Callable[..., tuple[Tensor, Tensor]]) -> Any:
            def product(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, ...]:
                own, left = (bias.detach(), bias.view_as(bias)) if bias_elsewhere else (bias, None)
                options = {"added_bias": pending.bias, "recompute": recompute}
                return *fused(x, pending.value, weight=weight, bias=own, **options), left

            return linear(x, product)

        total, value, left = self(x, linear=call)
        return total, Product(value, left)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the sigmoid approximation of GELU that OpenAI's CLIP uses."""

    def __init__(self) -> None:
        super().__init__()
        self.backend: ActivationFunction = torch_quick_gelu

    @property
    def fuses(self) -> bool:
        """Whether the backend can be part of the linear layer that follows."""
        return self.backend is triton_quick_gelu

    def then(self, linear: nn.Linear, x: Product, *, recompute: bool) -> Product:
        """A linear layer of the activation, where the backend :attr:`fuses`.

        Args:
            recompute: compute the activation again in the backward pass.
        """

        def product(y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            branch = quick_gelu_linear(y, weight, bias.detach(), x_bias=x.bias, recompute=recompute)
            return branch, bias.view_as(bias)

        return Product(*linear(x.value, product))

    def forward(self, x: Tensor) -> Tensor:
        return self.backend(x)
