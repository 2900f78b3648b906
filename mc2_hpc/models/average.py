"""The moving average of a run's weights, as checkpoints store it: ``ema.*.safetensors`` beside ``model.*.safetensors``,
under the same names. What was frozen is only in the latter.
"""

from pathlib import Path

from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.models.lora import folded
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.wrapped import UnwrappedTensorFiles

AVERAGE = "ema"
"""What the names of its files begin with."""


def has_average(folder: Path) -> bool:
    """Whether a checkpoint has a moving average of its weights."""
    return any(folder.glob(f"{AVERAGE}.*safetensors"))


def weight_files(folder: Path, *, ema: bool = False) -> TensorFiles:
    """The weights of a checkpoint of ours, or their moving average; adapters (:mod:`mc2_hpc.models.lora`) are folded.

    Raises:
        UserError: there are no weights, or no average, or the adapters do not fit ``model.json``.
    """
    if not ema:
        return folded(UnwrappedTensorFiles(folder, "model"))
    if not has_average(folder):
        raise UserError(f"{folder}: has no moving average of its weights (optim.ema_decay); leave out --ema")
    return folded(_AveragedTensorFiles(folder))


class _AveragedTensorFiles(UnwrappedTensorFiles):
    """A checkpoint's weights, with the average in place of each that has one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "model")
        self._average = TensorFiles(folder, AVERAGE)
        for name in self._average.names():
            if name not in self:
                raise UserError(f"{folder}: damaged checkpoint: it has the average of {name!r}, but no such weight")

    def get(self, name: str) -> Tensor:
        return self._average.get(name) if name in self._average else super().get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._average.shape(name) if name in self._average else super().shape(name)

    def stored_type(self, name: str) -> str:
        return self._average.stored_type(name) if name in self._average else super().stored_type(name)
