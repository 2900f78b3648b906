"""Features of images by any CLIP model, as curation takes them: ``mc2 curate dedup-images --features FOLDER``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from mc2_hpc.evaluation.loading import Clip, load
from mc2_hpc.threads import one_torch_thread


@dataclass(frozen=True)
class ClipFeatures:
    """An encoder of images. On a CPU it runs on one thread, because there is a worker per core."""

    model: str
    """Anything that :func:`mc2_hpc.load` reads."""
    device: str = ""
    """To run on; by default a GPU if there is one."""

    @cached_property
    def _clip(self) -> Clip:
        with one_torch_thread():  # the number of threads that onnxruntime starts here
            return load(self.model, self.device or None)

    def encode(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """Unit-length features ``(n, D)``."""
        with one_torch_thread() if self._clip.device.type == "cpu" else nullcontext():
            return self._clip.encode_image(list(images)).numpy()

    def sources(self) -> dict[str, str]:
        """The digest of the model and its image transform. Loaded on the CPU, so that the process that starts workers
        holds no GPU.

        Raises:
            UserError: it cannot be loaded.
        """
        return {"model": load(self.model, "cpu").dual.identity}
