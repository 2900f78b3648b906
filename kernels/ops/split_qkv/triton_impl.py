"""The gradient of fused queries, keys and values in one Triton kernel.

Shape suffixes: W width of a part, P programs for the same columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import num_processors

ROWS, COLUMNS = 8, 256
"""Of a block; a warp reads 16 bytes of bf16 per thread and row."""
NUM_WARPS = 8
PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, dqkv_ptr, dqkv_sum_ptr, num_rows, width,
    SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows (dq, dk, dv) of some columns and every P-th block of rows, and this program's share of their sum."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    q_sum, k_sum = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    v_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS):
        rows = first + tl.arange(0, ROWS)
        valid = (rows < num_rows)[:, None] & (columns < width)[None, :]
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        to = rows.to(tl.int64)[:, None] * (3 * width) + columns[None, :]
        dq = tl.load(dq_ptr + at, mask=valid, other=0.0)
        dk = tl.load(dk_ptr + at, mask=valid, other=0.0)
        dv = tl.load(dv_ptr + at, mask=valid, other=0.0)
        tl.store(dqkv_ptr + to, dq, mask=valid)
        tl.store(dqkv_ptr + to + width, dk, mask=valid)
        tl.store(dqkv_ptr + to + 2 * width, dv, mask=valid)
        if SUMS:
            q_sum += dq.to(tl.float32)
            k_sum += dk.to(tl.float32)
            v_sum += dv.to(tl.float32)
    if SUMS:
        at = tl.program_id(1) * 3 * width + columns
        tl.store(dqkv_sum_ptr + at, tl.sum(q_sum, 0), mask=columns < width)
        tl.store(dqkv_sum_ptr + at + width, tl.sum(k_sum, 0), mask=columns < width)
        tl.store(dqkv_sum_ptr + at + 2 * width, tl.sum(v_sum, 0), mask=columns < width)


class TritonSplit(torch.autograd.Function):
    """Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        ctx.bias_dtype = None if bias is None else bias.dtype
        return qkv.unbind(-3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = [part.contiguous() for part in gradients]
        (*rows, heads, depth), device = parts[0].shape, parts[0].device
        dqkv = parts[0].new_empty(*rows, 3, heads, depth)
        width, sums = heads * depth, ctx.needs_input_grad[1]
        num_rows, blocks = dqkv.numel() // (3 * max(width, 1)), triton.cdiv(width, COLUMNS)
        most = PROGRAMS_PER_PROCESSOR * num_processors(device) // max(blocks, 1)
        programs = min(triton.cdiv(num_rows, ROWS), max(most, 1))
        sums_PW = torch.empty(programs if sums else 0, 3 * width, dtype=torch.float32, device=device)
        if programs:
            with torch.cuda.device_of(dqkv):
                backward_kernel[(blocks, programs)](
                    *parts, dqkv, sums_PW, num_rows, width,
                    SUMS=sums, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS,
                )  # fmt: skip
        return dqkv, sums_PW.sum(0).to(ctx.bias_dtype) if sums else None
