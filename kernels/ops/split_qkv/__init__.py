"""Queries, keys and values as three views of their fused projection, whose gradients are put together in one pass.

PyTorch stacks the three gradients, and sums the result over rows for the projection's bias in a pass of its own.
"""

from torch import Tensor

from ..triton_launch import triton_obstacle

__all__ = ["split_qkv"]


def split_qkv(qkv: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(..., 3, H, D) to its three parts, (..., H, D) each; two runs give the same bits.

    Args:
        bias: (3 * H * D,), already added to ``qkv``; its gradient is computed here, as the sum over rows.

    Raises:
        ValueError: shapes that do not fit together.
        RuntimeError: Triton cannot run on this device; the message says why.
    """
    if qkv.dim() < 4 or qkv.shape[-3] != 3 or (bias is not None and bias.numel() != qkv.shape[-3:].numel()):
        of_bias = "" if bias is None else f" with a bias of {tuple(bias.shape)}"
        raise ValueError(f"split_qkv of {tuple(qkv.shape)}{of_bias}: they must be (..., 3, H, D) and (3 * H * D,)")
    if obstacle := triton_obstacle(qkv.device):
        raise RuntimeError(f"the Triton split_qkv cannot run: {obstacle}")
    from .triton_impl import TritonSplit

    parts: tuple[Tensor, Tensor, Tensor] = TritonSplit.apply(qkv, bias)
    return parts
