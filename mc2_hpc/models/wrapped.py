"""Weights saved from a wrapped model: removing the prefixes of torch's wrappers, and reading scalars as 0-d."""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.models.tensor_files import TensorFiles

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Name parts that DistributedDataParallel, torch.compile, FSDP and activation checkpointing insert, at the front or
around a block."""


_SCALARS = {"logit_scale", "logit_bias"}


class UnwrappedTensorFiles(TensorFiles):
    """Tensor files under the names that the model had before it was wrapped, and scalars as 0-d tensors."""

    def __init__(self, folder: Path, source: str | Sequence[Path]) -> None:
        """
        Raises:
            UserError: as for ``TensorFiles``, or two tensors have the same name without their wrappers.
        """
        super().__init__(folder, source)
        self._stored: dict[str, str] = {}
        for name in super().names():
            own = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            if own in self._stored:
                raise UserError(f"{folder}: {self._stored[own]!r} and {name!r} are the same weight; keep one")
            self._stored[own] = name

    def names(self) -> list[str]:
        """Sorted tensor names, without wrappers."""
        return sorted(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def get(self, name: str) -> Tensor:
        """One tensor, backed by the file's memory map."""
        tensor = super().get(self._stored[name])
        return tensor.reshape(()) if name in _SCALARS and tensor.numel() == 1 else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as :meth:`get` gives it."""
        shape = super().shape(self._stored[name])
        return () if name in _SCALARS and math.prod(shape) == 1 else shape

    def stored_type(self, name: str) -> str:
        """A tensor's type in its file."""
        return super().stored_type(self._stored[name])
