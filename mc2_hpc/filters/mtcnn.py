"""Faces found by MTCNN (Zhang et al. 2016, arXiv 1604.02878), with the networks and weights of ``facenet-pytorch``.

The package (MIT licence) asks for versions of PyTorch and NumPy that are older than ours, and works with newer ones:
``pip install --no-deps facenet-pytorch``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mc2_hpc.errors import UserError
from mc2_hpc.storage import file_sha256

if TYPE_CHECKING:
    from torch import Tensor

_PACKAGE = "facenet_pytorch"
_NETWORKS = {"pnet": "PNet", "rnet": "RNet", "onet": "ONet"}
_THRESHOLDS = (0.6, 0.7, 0.7)
"""Of the three networks, as in the paper's released code."""
_PYRAMID = 0.709
_SMALLEST = 20
"""Side of the smallest face that is looked for, in pixels of the reduced image."""
_LONGEST = 1024
"""Images are reduced to this before faces are looked for: the time grows with the pixels."""


class Mtcnn:
    """A :class:`~mc2_hpc.filters.faces.FaceDetector`."""

    def detect(self, images: Sequence[Image.Image]) -> list[npt.NDArray[np.float64]]:
        """See :class:`~mc2_hpc.filters.faces.FaceDetector`."""
        from mc2_hpc.threads import one_torch_thread

        with one_torch_thread():
            return [self._faces(image) for image in images]

    def sources(self) -> dict[str, str]:
        """Digests of the networks' weights."""
        return {name: file_sha256(self._folder / "data" / f"{name}.pt") for name in _NETWORKS}

    def _faces(self, image: Image.Image) -> npt.NDArray[np.float64]:
        import torch

        scale = min(1.0, _LONGEST / max(image.size))
        width, height = (max(1, round(side * scale)) for side in image.size)
        small = image if scale == 1.0 else image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        if min(small.size) < _SMALLEST:
            return np.zeros((0, 5))
        find, networks = self._detector
        with torch.inference_mode():
            (boxes,), _ = find([small], _SMALLEST, *networks, _THRESHOLDS, _PYRAMID, torch.device("cpu"))
        boxes = np.asarray(boxes, np.float64).reshape(-1, 5)
        boxes[:, :4] *= np.tile([image.width / width, image.height / height], 2)
        return boxes

    @property
    def _folder(self) -> Path:
        """Where the package is.

        Raises:
            UserError: it is not installed.
        """
        from mc2_hpc.conversion.peers import import_torchvision

        import_torchvision()  # facenet_pytorch imports it
        try:
            return Path(import_module(_PACKAGE).__path__[0])
        except ModuleNotFoundError as error:
            raise UserError(
                f"MTCNN needs facenet-pytorch ({error}): pip install --no-deps facenet-pytorch requests tqdm"
            ) from None

    @cached_property
    def _detector(self) -> tuple[Callable[..., Any], list[Any]]:
        """The package's function that finds faces, and its three networks."""
        import torch

        folder = self._folder
        package, functions = import_module(_PACKAGE), import_module(f"{_PACKAGE}.models.utils.detect_face")
        functions.batched_nms = _nms  # type: ignore[attr-defined]
        networks = []
        for name, kind in _NETWORKS.items():
            network = getattr(package, kind)(pretrained=False)
            network.load_state_dict(torch.load(folder / "data" / f"{name}.pt", map_location="cpu", weights_only=True))
            networks.append(network.eval())
        return functions.detect_face, networks


def _nms(boxes: Tensor, scores: Tensor, image_numbers: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of the boxes of one image, in place of torchvision's compiled operator, which does
    not load if torch is another build than it was compiled for.

    The box with the highest score stays, and those go whose intersection over union with it is above the threshold; and
    so on with the boxes that are left.

    Args:
        boxes: (n, 4): left, top, right, bottom.

    Returns:
        int64 indices of the boxes that stay, by descending score
    """
    import torch

    left = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        start, end = torch.maximum(boxes[left, :2], boxes[best, :2]), torch.minimum(boxes[left, 2:], boxes[best, 2:])
        overlap = (end - start).clamp(min=0).prod(1)
        left = left[overlap <= iou_threshold * (areas[left] + areas[best] - overlap)]
    return torch.stack(kept) if kept else left
