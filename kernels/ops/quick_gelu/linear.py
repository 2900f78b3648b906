"""Quick-GELU and a linear layer of it as one autograd function."""

from typing import Any

import torch
from torch import Tensor

from ..linear import bias_gradient, forward_product, input_gradient, product_dtype, weight_gradient
from .triton_impl import activate, differentiate


class TritonQuickGELULinear(torch.autograd.Function):
    """Keeps its input, the weight in the product's type and, without ``recompute``, the activation.

    Else the backward kernel, which reads the input in any case, writes the activation again, over its own gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor | None, recompute: bool
    ) -> Tensor:
        x = x.contiguous()
        y = activate(x).to(product_dtype(x))
        matrix = weight.to(y.dtype)
        ctx.save_for_backward(x, matrix, None if recompute else y)
        ctx.dtypes = [None if each is None else each.dtype for each in (x_bias, weight, bias)]
        return forward_product(y, matrix, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dout,), (x, matrix, y) = gradients, ctx.saved_tensors
        _, by_x_bias, by_weight, by_bias, _ = ctx.needs_input_grad
        x_bias_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dy = input_gradient(dout, matrix)
        dx, dx_sum = differentiate(x, dy, y=dy if y is None and by_weight else None, sums=by_x_bias)
        return (
            dx,
            None if dx_sum is None else dx_sum.to(x_bias_dtype),
            weight_gradient(dout, dy if y is None else y, weight_dtype) if by_weight else None,
            bias_gradient(dout, bias_dtype) if by_bias else None,
            None,
        )
