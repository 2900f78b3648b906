"""An encoder of images for de-duplication and decontamination: a model in ONNX, such as SSCD.

    PYTHONPATH=examples mc2 curate dedup-images POOL --out OUT --features image_encoder.OnnxEncoder model=sscd.onnx

The model has one input, images ``(B, H, W, 3)`` of bytes, and its first output is a feature ``(B, D)`` per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mc2_hpc.storage import file_sha256


@dataclass(frozen=True)
class OnnxEncoder:
    """Images squashed to ``size`` pixels, one after the other, on one thread: there is a worker per core."""

    model: Path
    size: int = 288

    @cached_property
    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return onnxruntime.InferenceSession(str(self.model), options)

    def sources(self) -> dict[str, str]:
        """The digest of the model, which is recorded with the result. Refuses a missing model before any work."""
        return {self.model.name: file_sha256(self.model)}

    def encode(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """Features ``(n, D)``."""
        name = self._session.get_inputs()[0].name
        squashed = (image.resize((self.size, self.size), Image.Resampling.BICUBIC) for image in images)
        return np.concatenate([self._session.run(None, {name: np.asarray(image)[None]})[0] for image in squashed])
