"""A filter by what a model in ONNX says of an image: a classifier, or a detector of unwanted things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageOps

from mc2_hpc.curation.filtering.images import PoolImage, ScoreFilter, per_image
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import shown
from mc2_hpc.reading.onnx_file import open_session, read_graph, runs_on_gpu
from mc2_hpc.storage import file_sha256

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_EXTRA = "filter"
_GPU_BATCH = 16
_LARGEST = 4096
"""Side of a model's input, in pixels."""


@dataclass(frozen=True, kw_only=True)
class OnnxScore(ScoreFilter):
    """Limits on the largest of a model's chosen outputs: ``<name>_low``, ``<name>_high``.

    The model has one input, images ``(B, 3, H, W)`` or ``(B, H, W, 3)``, and its first output is ``(B, classes, ...)``.
    Further axes, such as a detector's places, are reduced to their largest number. On a CPU it runs on one thread,
    because there is a worker per core.
    """

    model: Path
    """The ``.onnx`` file."""
    name: str = "onnx_score"
    """Of the score."""
    classes: str = ""
    """Numbers of the classes that count, from 0, with commas between them; all if empty."""
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    """Applied to the output, over its classes."""
    fit: Literal["squash", "crop", "pad"] = "squash"
    """How an image becomes the model's input: stretched; cut at its centre; or whole, with black at the right and
    below."""
    size: int = 0
    """Side of the input in pixels, for a model that takes any."""
    mean: str = "0"
    """Subtracted from pixels from 0 to 1; one number, or three for red, green, blue with commas between them."""
    std: str = "1"
    """What the difference is divided by, likewise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "model", Path(self.model).absolute())
        for option in ("mean", "std"):
            _channels(option, getattr(self, option))
        if not _channels("std", self.std).all():
            raise UserError(f"std={self.std}: nothing can be divided by 0")
        if self.classes and not all(part.strip().isdecimal() for part in self.classes.split(",")):
            raise UserError(f"classes={self.classes}: write numbers from 0 with commas between them, such as 2,3,14")
        if not 0 <= self.size <= _LARGEST:
            raise UserError(f"size={self.size}: must be at most {_LARGEST} pixels")

    def scores(self, rows: pa.Table, images: Sequence[PoolImage]) -> npt.NDArray[np.float64]:
        """See :class:`ScoreFilter`."""
        network = _open(self.model, self.size)
        inputs = [self._prepared(image.pixels, network) for image in dict.fromkeys(images)]
        return per_image(images, self._largest(network.run(inputs)).tolist())

    def sources(self) -> dict[str, str]:
        """The digest of the model, and of files that hold its weights.

        Raises:
            UserError: it cannot be loaded, or is not a model of images.
        """
        _open(self.model, self.size)
        files = [self.model, *read_graph(self.model, extra=_EXTRA).data]
        return {path.name: file_sha256(path) for path in files}

    def _prepared(self, image: Image.Image, network: _Network) -> npt.NDArray[Any]:
        size, method = (network.width, network.height), Image.Resampling.BILINEAR
        if self.fit == "pad":
            image = ImageOps.pad(image, size, method, color=0, centering=(0, 0))
        else:
            image = ImageOps.fit(image, size, method) if self.fit == "crop" else image.resize(size, method)
        pixels = np.asarray(image, np.float32) / 255
        pixels = (pixels - _channels("mean", self.mean)) / _channels("std", self.std)
        return (pixels.transpose(2, 0, 1) if network.channels_first else pixels).astype(network.kind)

    def _largest(self, output: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The score of each image from the model's output (B, classes, ...)."""
        values = output.reshape(*output.shape[:2], -1) if output.ndim > 1 else output[:, None, None]
        if self.activation == "softmax":
            values = np.exp(values - values.max(1, keepdims=True))
            values /= values.sum(1, keepdims=True)
        elif self.activation == "sigmoid":
            values = 1 / (1 + np.exp(-values))
        if self.classes:
            chosen = [int(part) for part in self.classes.split(",")]
            if max(chosen) >= values.shape[1]:
                raise UserError(f"classes={self.classes}: the model has {values.shape[1]} classes, from 0")
            values = values[:, chosen]
        return values.max((1, 2))


def _channels(option: str, numbers: str) -> npt.NDArray[np.float32]:
    """One number, or one each for red, green and blue."""
    try:
        values = np.array([float(part) for part in numbers.split(",")], np.float32)
    except ValueError:
        values = np.zeros(0, np.float32)
    if len(values) not in (1, 3) or not np.isfinite(values).all():
        raise UserError(f"{option}={numbers}: write one number, or three with commas between them")
    return values


class _Network(NamedTuple):
    """A model that is loaded."""

    session: Any
    kind: type
    """Of its numbers."""
    channels_first: bool
    height: int
    width: int
    batch: int

    def run(self, inputs: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
        """The first output for any number of images.

        Batches always have the same size, so that an image's numbers do not depend on the others in its batch.
        """
        outputs = []
        for start in range(0, len(inputs), self.batch):
            part = np.stack(inputs[start : start + self.batch])
            missing = self.batch - len(part)
            full = np.concatenate((part, np.zeros((missing, *part.shape[1:]), part.dtype)))
            (found, *_) = self.session.run(None, {self.session.get_inputs()[0].name: full})
            if not isinstance(found, np.ndarray) or found.ndim == 0 or len(found) != self.batch:
                raise UserError("the model's first output does not have an entry per image")
            outputs.append(found[: len(part)].astype(np.float64))
        return np.concatenate(outputs)


@lru_cache(maxsize=4)
def _open(path: Path, size: int) -> _Network:
    """Load a model and find out what it takes."""
    session = open_session(path, threads=1, extra=_EXTRA, gpu=True)
    inputs = session.get_inputs()
    shape = inputs[0].shape if inputs else []
    if len(inputs) != 1 or len(shape) != 4 or 3 not in (shape[1], shape[3]) or inputs[0].type not in _FLOATS:
        found = ", ".join(f"{one.type} {one.shape}" for one in inputs)
        raise UserError(f"{shown(path)}: must have one input, floats (B, 3, H, W) or (B, H, W, 3); it has {found}")
    channels_first = shape[1] == 3
    sides = shape[2:] if channels_first else shape[1:3]
    height, width = (side if isinstance(side, int) else size for side in sides)
    if not (0 < height <= _LARGEST and 0 < width <= _LARGEST):
        raise UserError(f"{shown(path)}: takes images of any size; give size=PIXELS")
    if size and (height, width) != (size, size):
        raise UserError(f"{shown(path)}: takes images of {width}x{height} pixels, not size={size}")
    batch = shape[0] if isinstance(shape[0], int) else _GPU_BATCH if runs_on_gpu(session) else 1
    return _Network(session, _FLOATS[inputs[0].type], channels_first, height, width, batch)
