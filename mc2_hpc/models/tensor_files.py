"""Weights in files: named tensors, read one at a time."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mc2_hpc.errors import UserError, first_line
from mc2_hpc.reading.tensors import TensorInfo, read_header
from mc2_hpc.reading.torch_file import read_torch_file

logger = logging.getLogger(__name__)


class TensorFiles:
    """Named tensors spread over files of a folder, read one at a time through a memory map."""

    def __init__(self, folder: Path, source: str | Sequence[Path]) -> None:
        """Index ``<source>.*.safetensors`` of ``folder`` or, if ``source`` is a list, these files of ``torch.save``.

        Raises:
            UserError: no such file, or one is damaged.
        """
        self.folder = folder
        self._info: dict[str, TensorInfo] = {}
        self._mapped: dict[str, Tensor] = {}
        self._cast: set[str] = set()
        paths = sorted(folder.glob(f"{source}.*safetensors")) if isinstance(source, str) else source
        for path in paths:
            header = read_header(path) if isinstance(source, str) else self._map(path)
            for name in header.keys() & self._info.keys():
                raise UserError(f"{path}: has {name!r}, which is also in {self._info[name].path.name}; remove one")
            self._info |= header
        if not self._info:
            shown = f"{source}.*.safetensors" if isinstance(source, str) else "tensors"
            raise UserError(f"{folder}: no {shown} there")

    def _map(self, path: Path) -> dict[str, TensorInfo]:
        tensors = read_torch_file(path)
        self._mapped |= tensors
        return {
            name: TensorInfo(path, _STORED.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }

    def names(self) -> list[str]:
        """Sorted tensor names."""
        return sorted(self._info)

    def paths(self) -> list[Path]:
        """The files, sorted."""
        return sorted({info.path for info in self._info.values()})

    def __contains__(self, name: str) -> bool:
        return name in self._info

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header of its file."""
        return self._info[name].shape

    def stored_type(self, name: str) -> str:
        """A tensor's type in its file, such as ``F32``."""
        return self._info[name].dtype

    def get(self, name: str) -> Tensor:
        """One tensor, backed by the file's memory map.

        Raises:
            UserError: its file was damaged after the header was read.
        """
        if name in self._mapped:
            return self._mapped[name]
        path = self._info[name].path
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"{path}: damaged safetensors file ({first_line(error)})") from None

    def get_fp32(self, name: str) -> Tensor:
        """One tensor as fp32: half precision is widened exactly, and fp64 is rounded; logged once per type.

        Raises:
            UserError: it does not hold floating-point numbers, or one of them is NaN or infinite.
        """
        tensor = self.get(name)
        if tensor.dtype not in _STORED:
            raise UserError(f"{self.folder}: {name} is {tensor.dtype}; convert weights of fp32, fp16 or bf16")
        kind = self.stored_type(name)
        if kind != "F32" and kind not in self._cast:
            self._cast.add(kind)
            logger.info("%s: weights of type %s (such as %s) are used as fp32", self.folder, kind, name)
        weight = tensor.float()
        # The largest magnitude is NaN or infinite if any element is; unlike isfinite, it allocates nothing.
        if weight.numel() and not math.isfinite(torch.linalg.vector_norm(weight, math.inf)):
            raise UserError(
                f"{self.folder}: {name} has values that are NaN or infinite; the file or its run is damaged"
            )
        return weight


_STORED = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Floating-point types, in safetensors' notation."""
