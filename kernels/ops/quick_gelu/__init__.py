"""Quick-GELU, the sigmoid approximation of GELU that OpenAI's CLIP uses: ``y = x * sigmoid(1.702 x)``.

(Hendrycks and Gimpel, arXiv 1606.08415, section 2.) One kernel forward and one backward; eager PyTorch launches
three and five, and keeps two tensors.
"""

from torch import Tensor

from ..triton_launch import triton_obstacle
from .reference import SLOPE, reference_quick_gelu

__all__ = ["SLOPE", "quick_gelu", "reference_quick_gelu"]


def quick_gelu(x: Tensor) -> Tensor:
    """The Triton kernels: computed in fp32, returned in the type of ``x``, the only tensor kept for backward.

    Raises:
        RuntimeError: Triton cannot run on this device; the message says why.
    """
    if obstacle := triton_obstacle(x.device):
        raise RuntimeError(f"the Triton quick-GELU cannot run: {obstacle}")
    from .triton_impl import TritonQuickGELU

    y: Tensor = TritonQuickGELU.apply(x)
    return y
