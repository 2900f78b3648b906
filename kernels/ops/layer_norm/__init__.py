"""Layer normalisation with statistics in fp32, whatever the types of its input and its parameters.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        over the last dimension, variance uncorrected

(Ba, Kiros and Hinton, arXiv 1607.06450). ``y`` has the type of ``x``: a bf16 residual stream is read and written in
bf16, where PyTorch under autocast first writes an fp32 copy, normalises that, and rounds the result in a third pass.
:func:`add_layer_norm` also adds to the stream in the same pass.
"""

from torch import Tensor

from ..triton_launch import triton_obstacle
from .reference import reference_layer_norm

__all__ = ["MOST_COLUMNS", "add_layer_norm", "layer_norm", "reference_layer_norm"]

MOST_COLUMNS = 1 << 13
"""A row is held in the registers of one program."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The Triton kernels, with gradients of all three tensors; two runs give the same bits.

    Args:
        x: (..., W) of any floating type; it is the only tensor of its size that is kept for the backward pass.
        weight, bias: (W,) of any floating type, usually fp32.
        eps: added to the variance.

    Returns:
        (..., W) in the type of ``x``.

    Raises:
        ValueError: shapes that do not fit together, or more than :data:`MOST_COLUMNS` columns.
        RuntimeError: Triton cannot run on this device; the message says why.
    """
    _check(x, weight, bias)
    from .triton_impl import TritonLayerNorm

    y: Tensor = TritonLayerNorm.apply(x, weight, bias, eps)
    return y


def add_layer_norm(x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """``x + added`` in the type of ``x``, and its :func:`layer_norm`, in one pass; so are their gradients.

    The sum is rounded before it is normalised, so both results equal those of the two steps.

    Args:
        x, added: (..., W) of one shape. The sum is the only tensor of its size that is kept for the backward pass.
        weight, bias, eps: as for :func:`layer_norm`.

    Raises:
        ValueError, RuntimeError: as for :func:`layer_norm`, or ``added`` has another shape.
    """
    _check(x, weight, bias)
    if added.shape != x.shape:
        raise ValueError(f"add_layer_norm of {tuple(x.shape)} and {tuple(added.shape)}: the shapes must be equal")
    from .triton_impl import TritonAddLayerNorm

    both: tuple[Tensor, Tensor] = TritonAddLayerNorm.apply(x, added, weight, bias, eps)
    return both


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    width = x.shape[-1] if x.dim() else 0
    if weight.shape != (width,) or bias.shape != (width,) or not 0 < width <= MOST_COLUMNS:
        raise ValueError(
            f"layer_norm of {tuple(x.shape)} by a weight of {tuple(weight.shape)} and a bias of {tuple(bias.shape)}: "
            f"both need the size of the last dimension, which is from 1 to {MOST_COLUMNS:,}"
        )
    if obstacle := triton_obstacle(x.device):
        raise RuntimeError(f"the Triton layer norm cannot run: {obstacle}")
