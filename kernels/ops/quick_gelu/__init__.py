"""Quick-GELU, the sigmoid approximation of GELU that OpenAI's CLIP uses: ``y = x * sigmoid(1.702 x)``.

(Hendrycks and Gimpel, arXiv 1606.08415, section 2.) One kernel forward and one backward; eager PyTorch launches
three and five, and keeps two tensors.
"""

from torch import Tensor

from ..triton_launch import triton_obstacle
from .reference import SLOPE, reference_quick_gelu

__all__ = ["SLOPE", "quick_gelu", "quick_gelu_linear", "reference_quick_gelu"]


def quick_gelu(x: Tensor) -> Tensor:
    """The Triton kernels: computed in fp32, returned in the type of ``x``, the only tensor kept for backward.

    Raises:
        RuntimeError: Triton cannot run on this device; the message says why.
    """
    _check(x)
    from .triton_impl import TritonQuickGELU

    y: Tensor = TritonQuickGELU.apply(x)
    return y


def quick_gelu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, x_bias: Tensor | None = None, recompute: bool = False
) -> Tensor:
    """:func:`quick_gelu` and ``F.linear`` of it, in autocast's type: (..., M) to (..., W).

    Args:
        weight, bias: (W, M) and (W,), of the linear layer.
        x_bias: (M,), already in ``x``; its gradient is computed here, as the sum over rows of that of ``x``.
        recompute: do not keep the activation for the backward pass, which writes it again in its one pass.

    Raises:
        RuntimeError: Triton cannot run on this device; the message says why.
    """
    _check(x)
    from .linear import TritonQuickGELULinear

    y: Tensor = TritonQuickGELULinear.apply(x, x_bias, weight, bias, recompute)
    return y


def _check(x: Tensor) -> None:
    if obstacle := triton_obstacle(x.device):
        raise RuntimeError(f"the Triton quick-GELU cannot run: {obstacle}")
