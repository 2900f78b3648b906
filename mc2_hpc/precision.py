"""The precision that a model computes in, by the names that configs and commands use."""

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Precision(StrEnum):
    """``fp32``; ``bf16``: autocast over fp32 parameters; or ``fp8``: the same, with the large products of the blocks in
    fp8 while they are trained (:mod:`mc2_hpc.models.float8`)."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"

    @property
    def untrained(self) -> "Precision":
        """That of models that are not trained: in evaluation, as teachers, and to store features."""
        return Precision.BF16 if self is Precision.FP8 else self

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of activations and of the features that enter the loss."""
        import torch  # not at the top: configs are read without torch

        return torch.float32 if self is Precision.FP32 else torch.bfloat16

    def autocast(self, device: "torch.device") -> "torch.autocast":
        """The context in which the towers run; it does nothing for ``fp32``."""
        import torch

        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self is not Precision.FP32)
