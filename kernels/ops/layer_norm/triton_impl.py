"""The layer norm in two Triton kernels: one pass over memory forward, one backward.

Shape suffixes: R rows, W width, P programs of the backward kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_for, num_programs

# Triton's interpreter runs programs one after another; a few are enough to test that their sums are added up.
_INTERPRETED_PROCESSORS = 2


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, scale_ptr, width, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: its normalised values, and in fp32 its mean and 1 / sqrt(variance + eps)."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    valid = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=valid, other=0.0).to(tl.float32)
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
    x_ptr, weight_ptr, mean_ptr, scale_ptr, dy_ptr, dx_ptr, dweight_ptr, dbias_ptr, num_rows, width,
    PARAMETERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of every P-th row, and this program's share of the parameters' gradients if ``PARAMETERS``.

    With u = (x - mean) * scale and g = dy * weight: dx = scale * (g - mean(g) - u * mean(g * u)), dweight = sum(dy * u)
    and dbias = sum(dy) over rows.
    """
    columns = tl.arange(0, BLOCK)
    valid = columns < width
    weight = tl.load(weight_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    at = tl.program_id(0).to(tl.int64) * width + columns
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=valid, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        u = tl.where(valid, (x - tl.load(mean_ptr + row)) * scale, 0.0)
        g = dy * weight
        dx = scale * (g - tl.sum(g, 0) / width - u * (tl.sum(g * u, 0) / width))
        tl.store(dx_ptr + at, dx, mask=valid)
        at += tl.num_programs(0).to(tl.int64) * width
        if PARAMETERS:
            dweight += dy * u
            dbias += dy
    if PARAMETERS:
        at = tl.program_id(0) * width + columns
        tl.store(dweight_ptr + at, dweight, mask=valid)
        tl.store(dbias_ptr + at, dbias, mask=valid)


class TritonLayerNorm(torch.autograd.Function):
    """Keeps its input, and two fp32 numbers per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        num_rows = x.numel() // width
        mean_R, scale_R = torch.empty(2, num_rows, dtype=torch.float32, device=x.device)
        launch = launch_for(width)
        if num_rows:
            with torch.cuda.device_of(x):
                forward_kernel[(num_rows,)](
                    x, weight, bias, y, mean_R, scale_R, width, eps, BLOCK=launch.BLOCK, num_warps=launch.num_warps
                )
        ctx.save_for_backward(x, weight, mean_R, scale_R)
        ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean_R, scale_R = ctx.saved_tensors
        dy = gradients[0].contiguous()
        dx = torch.empty_like(x)
        width, launch = x.shape[-1], launch_for(x.shape[-1])
        parameters = any(ctx.needs_input_grad[1:3])
        programs = num_programs(len(mean_R), _num_processors(x.device))
        sums_2PW = torch.empty(2, programs if parameters else 0, width, dtype=torch.float32, device=x.device)
        if programs:
            with torch.cuda.device_of(x):
                backward_kernel[(programs,)](
                    x, weight, mean_R, scale_R, dy, dx, sums_2PW[0], sums_2PW[1], len(mean_R), width,
                    PARAMETERS=parameters, BLOCK=launch.BLOCK, num_warps=launch.num_warps,
                )  # fmt: skip
        if not parameters:
            return dx, None, None, None
        dweight, dbias = sums_2PW.sum(1)
        return dx, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
