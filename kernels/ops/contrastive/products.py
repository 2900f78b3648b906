"""Matrix products that accumulate in fp32 for operands of any type.

On a GPU, products of half-precision operands are exact in fp32 sums. PyTorch's CPU products round the result to half
precision, far too coarse for logits, so on a CPU the operands are converted to fp32 first.
"""

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulator type: fp64 for fp64 operands, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right, with out in the accumulator's type."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if out.device.type == "cpu":
        return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def accumulate(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out += left @ right, with out in the accumulator's type."""
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, out=out)
    if out.device.type == "cpu":
        return torch.addmm(out, left.to(out.dtype), right.to(out.dtype), out=out)
    return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
