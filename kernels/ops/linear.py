"""The matrix products of a linear layer, for autograd functions that do more than the layer in the same pass.

Shape suffixes: I inputs of the layer, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The type that a linear layer multiplies ``x`` in: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def forward_product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """(..., I) to (..., O), in the type of ``x`` and ``weight_OI``."""
    return F.linear(x, weight_OI, None if bias_O is None else bias_O.to(x.dtype))


def input_gradient(dy: Tensor, weight_OI: Tensor) -> Tensor:
    """(..., O) to (..., I)."""
    return dy @ weight_OI


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """(O, I) in ``dtype``: summed over rows. On a GPU sums of half types are not rounded on their way to fp32."""
    dy_OR, x_RI = dy.flatten(0, -2).t(), x.flatten(0, -2)
    if x.device.type == "cuda" and dtype == torch.float32 and x.dtype != dtype:
        return torch.mm(dy_OR, x_RI, out_dtype=dtype)
    return torch.mm(dy_OR, x_RI).to(dtype)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """(O,): a pass of its own over the gradient."""
    return dy.flatten(0, -2).sum(0).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` with the weight's gradient from :func:`weight_gradient`: (..., I) to (..., O)."""
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.to(product_dtype(x))
        matrix = weight.to(rows.dtype)
        ctx.save_for_backward(rows, matrix)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return forward_product(rows, matrix, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rows, matrix), (dy,) = ctx.saved_tensors, gradients
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            input_gradient(dy, matrix).to(x_dtype) if ctx.needs_input_grad[0] else None,
            weight_gradient(dy, rows, weight_dtype) if ctx.needs_input_grad[1] else None,
            bias_gradient(dy, bias_dtype) if ctx.needs_input_grad[2] else None,
        )


def with_bias_gradient(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y``, (..., O), in which ``bias`` is contained already without a gradient: it gets its gradient here."""
    if bias is None:
        return y
    same: Tensor = _BiasGradient.apply(y, bias)
    return same


class _BiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (dy,) = gradients
        return dy, bias_gradient(dy, ctx.dtype) if ctx.needs_input_grad[1] else None
