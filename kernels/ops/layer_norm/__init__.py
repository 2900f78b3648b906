"""Layer normalisation with statistics in fp32, whatever the types of its input and its parameters.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        over the last dimension, variance uncorrected

(Ba, Kiros and Hinton, arXiv 1607.06450). ``y`` has the type of ``x``: a bf16 residual stream is read and written in
bf16, where PyTorch under autocast first writes an fp32 copy, normalises that, and rounds the result in a third pass.
:func:`add_layer_norm` also adds to the stream in the same pass, and :func:`add_norm_linear` is that together with the
linear layer after it, whose backward pass then needs neither a kept norm nor another pass to compute it again.
"""

from torch import Tensor

from ..triton_launch import triton_obstacle
from .reference import reference_layer_norm

__all__ = [
    "MOST_COLUMNS",
    "MOST_FUSED_COLUMNS",
    "add_layer_norm",
    "add_norm_linear",
    "layer_norm",
    "reference_layer_norm",
]

MOST_COLUMNS = 1 << 13
"""A row is held in the registers of one program."""

MOST_FUSED_COLUMNS = 1 << 12
"""Of :func:`add_norm_linear`, whose backward kernel keeps more of a row: beyond, registers would spill."""


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
    _check_added(x, added)
    from .triton_impl import TritonAddLayerNorm

    both: tuple[Tensor, Tensor] = TritonAddLayerNorm.apply(x, added, weight, bias, eps)
    return both


def add_norm_linear(
    x: Tensor,
    added: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    added_bias: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`add_layer_norm` and ``F.linear`` of its norm, in autocast's type; returns the sum and that product.

    Args:
        x, added: (..., W) of one shape; without ``added`` the sum is ``x``.
        norm_weight, norm_bias, eps: as for :func:`layer_norm`.
        weight, bias: (V, W) and (V,), of the linear layer.
        added_bias: (W,), already in ``added``; its gradient is computed here, as the sum over rows of that of
            ``added``.
        recompute: do not keep the norm for the backward pass.

    Raises:
        ValueError, RuntimeError: as for :func:`add_layer_norm`, with at most :data:`MOST_FUSED_COLUMNS` columns.
    """
    _check(x, norm_weight, norm_bias, most=MOST_FUSED_COLUMNS)
    if added is not None:
        _check_added(x, added)
    from .linear import TritonAddNormLinear

    both: tuple[Tensor, Tensor] = TritonAddNormLinear.apply(
        x, added, added_bias, norm_weight, norm_bias, eps, weight, bias, recompute
    )
    return both


def _check_added(x: Tensor, added: Tensor) -> None:
    if added.shape != x.shape:
        raise ValueError(f"add_layer_norm of {tuple(x.shape)} and {tuple(added.shape)}: the shapes must be equal")


def _check(x: Tensor, weight: Tensor, bias: Tensor, most: int = MOST_COLUMNS) -> None:
    width = x.shape[-1] if x.dim() else 0
    if weight.shape != (width,) or bias.shape != (width,) or not 0 < width <= most:
        raise ValueError(
            f"layer_norm of {tuple(x.shape)} by a weight of {tuple(weight.shape)} and a bias of {tuple(bias.shape)}: "
            f"both need the size of the last dimension, which is from 1 to {most:,}"
        )
    if obstacle := triton_obstacle(x.device):
        raise RuntimeError(f"the Triton layer norm cannot run: {obstacle}")
