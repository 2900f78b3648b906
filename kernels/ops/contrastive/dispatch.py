"""Which backend computes the loss, by an explicit table."""

import logging

import torch
from torch import Tensor

from ..triton_launch import triton_obstacle
from .teacher import Distillation
from .tiles import TileFactory, TileOperations
from .torch_tiles import DistilledTorchTiles, SigmoidTorchTiles, TorchTiles

BACKENDS = ("auto", "triton", "tiled", "reference")

AUTO_BACKEND = {("cuda", torch.bfloat16): "triton", ("cuda", torch.float16): "triton"}
"""What ``auto`` selects by device and type of the features; ``tiled`` for all others. The Triton kernels equal float64
in half precision and keep logits on the chip. fp32 logits pass through memory with either backend."""

WORKSPACE_BYTES = {"cuda": 512 << 20, "cpu": 16 << 20}
"""Default workspace on each device: large launches on a GPU, tiles that fit in the cache on a CPU."""

SMALLEST_WORKSPACE_BYTES = 64 << 10

logger = logging.getLogger(__name__)
_logged: set[str] = set()


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to use, by name or, for ``auto``, by the table; logs once what ``auto`` selected and why.

    ``auto`` never fails: it selects ``tiled`` where the table's choice cannot run. Raises ``ValueError`` for an unknown
    name, ``RuntimeError`` for one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown contrastive loss backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        picked, why = AUTO_BACKEND.get((device.type, dtype), "tiled"), f"{_name(dtype)} features on {device.type}"
        if picked == "triton" and (obstacle := triton_obstacle(device)):
            picked, why = "tiled", f"{why}; triton cannot run: {obstacle}"
        _log_once(f"contrastive loss: auto selected the {picked} backend ({why})")
        return picked
    if backend == "triton" and (obstacle := triton_obstacle(device)):
        raise RuntimeError(f"contrastive loss backend 'triton' cannot run: {obstacle}")
    return backend


def tile_factory(
    backend: str, workspace_bytes: int | None, distillation: Distillation | None = None, bias: Tensor | None = None
) -> TileFactory:
    """A factory for a backend's tiles within a workspace of this many bytes; ``None`` is the device's default.

    Args:
        bias: 0-d in the accumulator's type; makes them those of the sigmoid loss.
    """
    if workspace_bytes is not None and workspace_bytes < SMALLEST_WORKSPACE_BYTES:
        raise ValueError(f"workspace_bytes={workspace_bytes} is too small: use at least {SMALLEST_WORKSPACE_BYTES}")

    def make(image: Tensor, num_columns: int) -> TileOperations:
        size = workspace_bytes or WORKSPACE_BYTES.get(image.device.type, WORKSPACE_BYTES["cuda"])
        if backend == "triton":
            from .triton_distillation import DistilledTritonTiles
            from .triton_impl import TritonTiles
            from .triton_sigmoid import SigmoidTritonTiles

            if bias is not None:
                return SigmoidTritonTiles(image, num_columns, size, bias)
            if distillation is not None:
                return DistilledTritonTiles(image, num_columns, size, distillation)
            return TritonTiles(image, num_columns, size)
        if bias is not None:
            return SigmoidTorchTiles(image, num_columns, size, bias)
        if distillation is not None:
            return DistilledTorchTiles(image, num_columns, size, distillation)
        return TorchTiles(image, num_columns, size)

    return make


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)
