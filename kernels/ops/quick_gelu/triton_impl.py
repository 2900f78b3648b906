"""Quick-GELU in two Triton kernels: one pass over memory forward, one backward.

Shape suffixes: W width, P programs of the backward kernel for the same columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import num_processors
from .reference import SLOPE

BLOCK = 2048
NUM_WARPS = 8
"""256 threads with 8 elements each: 16 bytes of bf16 per load."""
ROWS, COLUMNS = 8, 256
"""Of a block of the backward kernel: as many elements per thread, each warp on one row."""
PROGRAMS_PER_PROCESSOR = 4
"""Of the backward kernel, on each multiprocessor."""
_SLOPE = tl.constexpr(SLOPE)


@triton.jit
def forward_kernel(x_ptr, y_ptr, num_elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < num_elements).to(tl.float32)
    tl.store(y_ptr + at, x / (1 + tl.exp(-(x * _SLOPE))), mask=at < num_elements)


@triton.jit
def backward_kernel(
    x_ptr, dy_ptr, dx_ptr, y_ptr, dx_sum_ptr, num_rows, width,
    VALUES: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx = dy * s * (1 + 1.702 x (1 - s)), with s = sigmoid(1.702 x), for some columns and every P-th block of rows.

    If ``VALUES``, the forward pass's y is stored as well, perhaps in place of dy; if ``SUMS``, this program's share of
    the sum of dx over rows.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS):
        rows = first + tl.arange(0, ROWS)
        valid = (rows < num_rows)[:, None] & (columns < width)[None, :]
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=valid, other=0.0).to(tl.float32)
        scaled = x * _SLOPE  # in this order: the interpreter cannot multiply a constant by a tensor
        divisor = 1 + tl.exp(-scaled)
        gate = 1 / divisor
        dx = dy * gate * (1 + scaled * (1 - gate))
        tl.store(dx_ptr + at, dx, mask=valid)
        if VALUES:
            tl.store(y_ptr + at, x / divisor, mask=valid)
        if SUMS:
            sums += dx
    if SUMS:
        at = tl.program_id(1) * width + columns
        tl.store(dx_sum_ptr + at, tl.sum(sums, 0), mask=columns < width)


class TritonQuickGELU(torch.autograd.Function):
    """Keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return activate(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return differentiate(x, gradients[0])[0]


def activate(x: Tensor) -> Tensor:
    """Quick-GELU of a contiguous tensor."""
    y = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)
    return y


def differentiate(
    x: Tensor, dy: Tensor, *, y: Tensor | None = None, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradient by ``x``, and if ``sums`` its sum over rows: (W,) in fp32, before the gradient is rounded.

    Args:
        y: a contiguous tensor that gets the values again; it may be ``dy``.
    """
    dy, dx = dy.contiguous(), torch.empty_like(x)
    width = x.shape[-1] if x.dim() else 1
    num_rows, blocks = x.numel() // width if width else 0, triton.cdiv(width, COLUMNS)
    programs = min(
        triton.cdiv(num_rows, ROWS), max(PROGRAMS_PER_PROCESSOR * num_processors(x.device) // max(blocks, 1), 1)
    )
    sums_PW = torch.empty(programs if sums else 0, width, dtype=torch.float32, device=x.device)
    if programs:
        with torch.cuda.device_of(x):
            backward_kernel[(blocks, programs)](
                x, dy, dx, y, sums_PW, num_rows, width,
                VALUES=y is not None, SUMS=sums, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS,
            )  # fmt: skip
    return dx, sums_PW.sum(0) if sums else None
