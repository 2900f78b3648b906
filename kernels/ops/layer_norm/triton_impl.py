"""The layer norm in two Triton kernels: one pass over memory forward, one backward.

Shape suffixes: R rows, W width, P programs of the backward kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import num_processors
from .launch import launch_for, num_programs

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def forward_kernel(
    x_ptr, added_ptr, sum_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, scale_ptr, width, eps,
    ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: its normalised values, and in fp32 its mean and 1 / sqrt(variance + eps).

    If ``ADDED``, the row is x + added, which is also stored; it is normalised as it was rounded.
    """
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    valid = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=valid, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(added_ptr + row * width + columns, mask=valid, other=0.0).to(tl.float32)
        if INTERPRETED and sum_ptr.dtype.element_ty == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)  # to nearest, ties to even
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + columns, rounded, mask=valid)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, 0) / width
    centred = tl.where(valid, x - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(scale_ptr + row, scale)
    weight = tl.load(weight_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + columns, centred * scale * weight + bias, mask=valid)


@triton.jit
def backward_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, scale_ptr, dy_ptr, dsum_ptr, dx_ptr, y_ptr,
    dweight_ptr, dbias_ptr, dx_sum_ptr, num_rows, width,
    PARAMETERS: tl.constexpr, ADDED: tl.constexpr, NORMALISES: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of every P-th row, and this program's share of the parameters' gradients if ``PARAMETERS``.

    With u = (x - mean) * scale and g = dy * weight: dx = scale * (g - mean(g) - u * mean(g * u)), dweight = sum(dy * u)
    and dbias = sum(dy) over rows. If ``ADDED``, x is a sum whose own gradient dsum is added to dx. If ``NORMALISES``,
    the forward pass's y is stored as well, perhaps in place of dy; if ``SUMS``, this program's share of sum(dx).
    """
    columns = tl.arange(0, BLOCK)
    valid = columns < width
    weight = tl.load(weight_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    if NORMALISES:
        bias = tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    dx_sum = tl.zeros((BLOCK,), tl.float32)
    at = tl.program_id(0).to(tl.int64) * width + columns
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=valid, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        u = tl.where(valid, (x - tl.load(mean_ptr + row)) * scale, 0.0)
        g = dy * weight
        dx = scale * (g - tl.sum(g, 0) / width - u * (tl.sum(g * u, 0) / width))
        if ADDED:
            dx += tl.load(dsum_ptr + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=valid)
        if NORMALISES:
            tl.store(y_ptr + at, u * weight + bias, mask=valid)
        at += tl.num_programs(0).to(tl.int64) * width
        if PARAMETERS:
            dweight += dy * u
            dbias += dy
        if SUMS:
            dx_sum += tl.where(valid, dx, 0.0)
    at = tl.program_id(0) * width + columns
    if PARAMETERS:
        tl.store(dweight_ptr + at, dweight, mask=valid)
        tl.store(dbias_ptr + at, dbias, mask=valid)
    if SUMS:
        tl.store(dx_sum_ptr + at, dx_sum, mask=valid)


class TritonLayerNorm(torch.autograd.Function):
    """Keeps its input, and two fp32 numbers per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, *statistics = normalise(x, None, None, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, *statistics)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        found = differentiate(ctx.saved_tensors, gradients[0], None, parameters=any(ctx.needs_input_grad[1:3]))
        return found.dx, found.dweight, found.dbias, None


class TritonAddLayerNorm(torch.autograd.Function):
    """A sum and its layer norm. Keeps the sum, and two fp32 numbers per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, added = x.contiguous(), added.contiguous()
        total = torch.empty_like(x)
        y, *statistics = normalise(x, added, total, weight, bias, eps)
        ctx.save_for_backward(total, weight, bias, *statistics)
        ctx.added_dtype = added.dtype
        return total, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None]:
        dtotal, dy = gradients
        found = differentiate(ctx.saved_tensors, dy, dtotal, parameters=any(ctx.needs_input_grad[2:4]))
        return found.dx, found.dx.to(ctx.added_dtype), found.dweight, found.dbias, None


@dataclass(frozen=True)
class Gradients:
    """What the backward kernel computed; ``None`` for what was not asked for."""

    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    dx_sum: Tensor | None
    """(W,) in fp32: ``dx`` summed over rows, before it is rounded."""


def normalise(
    x: Tensor, added: Tensor | None, total: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, and (R,) means and scales; ``total`` gets the sum with ``added``, if there is one."""
    y, width = torch.empty_like(x), x.shape[-1]
    num_rows, launch = x.numel() // width, launch_for(width)
    mean_R, scale_R = torch.empty(2, num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        with torch.cuda.device_of(x):
            forward_kernel[(num_rows,)](
                x, added, total, weight, bias, y, mean_R, scale_R, width, eps,
                ADDED=added is not None, BLOCK=launch.BLOCK, num_warps=launch.num_warps,
            )  # fmt: skip
    return y, mean_R, scale_R


def differentiate(
    saved: Sequence[Tensor],
    dy: Tensor,
    dtotal: Tensor | None,
    *,
    parameters: bool,
    y: Tensor | None = None,
    sums: bool = False,
) -> Gradients:
    """Gradients by the input, weight and bias of :func:`normalise`.

    Args:
        saved: the input that was normalised, weight, bias, and both of its statistics.
        dtotal: the input's own gradient, added to the one that comes from the norm.
        parameters: whether to compute the gradients of weight and bias.
        y: a contiguous tensor that gets the normalised rows again; it may be ``dy``.
        sums: whether to sum the input's gradient over rows.
    """
    x, weight, bias, mean_R, scale_R = saved
    dy, dx = dy.contiguous(), torch.empty_like(x)
    dtotal = None if dtotal is None else dtotal.contiguous()
    width, launch = x.shape[-1], launch_for(x.shape[-1])
    programs = num_programs(len(mean_R), num_processors(x.device))
    sums_3PW = torch.empty(3, programs if parameters or sums else 0, width, dtype=torch.float32, device=x.device)
    if programs:
        with torch.cuda.device_of(x):
            backward_kernel[(programs,)](
                x, weight, bias, mean_R, scale_R, dy, dtotal, dx, y, *sums_3PW.unbind(), len(mean_R), width,
                PARAMETERS=parameters, ADDED=dtotal is not None, NORMALISES=y is not None, SUMS=sums,
                BLOCK=launch.BLOCK, num_warps=launch.num_warps,
            )  # fmt: skip
    first, last = 0 if parameters else 2, 3 if sums else 2
    totals = dict(zip(range(first, last), sums_3PW[first:last].sum(1), strict=True))
    if not parameters:
        return Gradients(dx, None, None, totals.get(2))
    return Gradients(dx, totals[0].to(weight.dtype), totals[1].to(bias.dtype), totals.get(2))
