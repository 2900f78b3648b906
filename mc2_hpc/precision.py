"""The precision that a model computes in, by the names that configs and commands use."""

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Precision(StrEnum):
    """``fp32``, or ``bf16``: autocast over fp32 parameters."""

    FP32 = "fp32"
    BF16 = "bf16"

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of activations and of the features that enter the loss."""
        import torch  # not at the top: configs are read without torch

        return {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}[self]

    def autocast(self, device: "torch.device") -> "torch.autocast":
        """The context in which the towers run; it does nothing for ``fp32``."""
        import torch

        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self is Precision.BF16)
