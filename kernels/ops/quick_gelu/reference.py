"""The float64 reference of quick-GELU."""

import torch
from torch import Tensor

SLOPE = 1.702
"""Of the sigmoid's argument."""


def reference_quick_gelu(x: Tensor) -> Tensor:
    """Quick-GELU in float64."""
    return x.double() * torch.sigmoid(SLOPE * x.double())
