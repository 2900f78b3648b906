"""Some rows of a tensor, with a gradient that is a copy."""

from typing import Any, cast

import torch
from torch import Tensor


def take_rows(x: Tensor, rows_B: Tensor) -> Tensor:
    """Rows of (..., W), counted over all leading dimensions, as (B, W).

    Args:
        rows_B: int64, distinct.
    """
    return cast(Tensor, _TakeRows.apply(x.flatten(0, -2), rows_B))


class _TakeRows(torch.autograd.Function):
    """Rows are distinct, so their gradients can be copied; autograd would add them, one by one on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows_B: Tensor) -> Tensor:
        ctx.save_for_backward(rows_B)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, rows_B)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (rows_B,) = ctx.saved_tensors
        whole = gradients[0].new_zeros(ctx.num_rows, gradients[0].shape[1])
        return whole.index_copy_(0, rows_B, gradients[0]), None
