"""An addition, its layer norm and a linear layer of that as one autograd function."""

from typing import Any

import torch
from torch import Tensor

from ..linear import bias_gradient, forward_product, input_gradient, product_dtype, weight_gradient
from .triton_impl import differentiate, normalise


class TritonAddNormLinear(torch.autograd.Function):
    """Keeps the sum, two fp32 numbers per row, the weight in the product's type and, without ``recompute``, the norm.

    Else the backward kernel, which reads the sum in any case, writes the norm again, over the norm's own gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        added_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        x, total = x.contiguous(), None
        if added is not None:
            added, total = added.contiguous(), torch.empty_like(x)
        y, *statistics = normalise(x, added, total, norm_weight, norm_bias, eps)
        y = y.to(product_dtype(x))
        matrix = weight.to(y.dtype)
        total = x if total is None else total
        ctx.save_for_backward(total, norm_weight, norm_bias, *statistics, matrix, None if recompute else y)
        ctx.dtypes = [None if each is None else each.dtype for each in (added, added_bias, weight, bias)]
        return total, forward_product(y, matrix, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dtotal, dout), (*saved, matrix, y) = gradients, ctx.saved_tensors
        _, _, by_added_bias, by_norm_weight, by_norm_bias, _, by_weight, by_bias, _ = ctx.needs_input_grad
        added_dtype, added_bias_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dy = input_gradient(dout, matrix)
        again = dy if y is None and by_weight else None
        found = differentiate(saved, dy, dtotal, parameters=by_norm_weight or by_norm_bias, y=again, sums=by_added_bias)
        return (
            found.dx,
            None if added_dtype is None else found.dx.to(added_dtype),
            None if found.dx_sum is None else found.dx_sum.to(added_bias_dtype),
            found.dweight,
            found.dbias,
            None,
            weight_gradient(dout, dy if y is None else y, weight_dtype) if by_weight else None,
            bias_gradient(dout, bias_dtype) if by_bias else None,
            None,
        )
