"""Filters of faces: drop the images that have them, or blur them. What finds faces is pluggable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageFilter

from mc2_hpc.curation.filtering.images import PoolImage, ScoreFilter, per_image
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.named import describe, import_object

_MTCNN = "mc2_hpc.filters.mtcnn.Mtcnn"
_CONFIDENCE = 0.9
_BLUR = 0.2
"""Standard deviation of the blur, as a share of the box's longer side: of a face, only its colour is left."""


class FaceDetector(Protocol):
    """Finds faces. Created once per process, without arguments; may have a method ``sources()`` with digests of files,
    like a filter."""

    def detect(self, images: Sequence[Image.Image]) -> Sequence[npt.NDArray[Any]]:
        """The faces in each image: numbers ``(faces, 5)``, left, top, right and bottom in pixels, and a confidence from
        0 to 1.

        Args:
            images: RGB, upright.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class DropFaces(ScoreFilter):
    """Drops images with a face: the score is the highest confidence, 0 without a face; ``face_high``."""

    detector: str = _MTCNN
    """A class with the methods of :class:`FaceDetector`."""
    most: float | None = _CONFIDENCE

    @property
    def name(self) -> str:
        """``face``."""
        return "face"

    def scores(self, rows: pa.Table, images: Sequence[PoolImage]) -> npt.NDArray[np.float64]:
        """See :class:`ScoreFilter`."""
        faces = detect(self.detector, list(dict.fromkeys(images)))
        return per_image(images, (boxes[:, 4].max(initial=0.0) for boxes in faces))

    def sources(self) -> dict[str, str]:
        """What the detector says."""
        return _sources(self.detector)


@dataclass(frozen=True, kw_only=True)
class BlurFaces:
    """Blurs faces, and drops nothing; the change is ``faces_blurred``."""

    detector: str = _MTCNN
    """A class with the methods of :class:`FaceDetector`."""
    least: float = _CONFIDENCE
    """Confidence above which something counts as a face, as with ``most`` of :class:`DropFaces`."""
    margin: float = 0.2
    """How much wider than its box the blurred region of a face is at each edge, as a share of the box."""

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= 10:
            raise UserError(f"margin={self.margin:g}: must be from 0 to 10")

    def drop_reasons(self, rows: pa.Table, images: Sequence[PoolImage]) -> list[None]:
        """See :class:`~mc2_hpc.curation.filtering.images.ImageFilter`."""
        each = list(dict.fromkeys(images))
        for image, faces in zip(each, detect(self.detector, each), strict=True):
            boxes = [box for *box, confidence in faces.tolist() if confidence > self.least]
            if boxes:
                image.replace(blurred(image.pixels, boxes, self.margin), "faces_blurred")
        return [None] * len(rows)

    def sources(self) -> dict[str, str]:
        """What the detector says."""
        return _sources(self.detector)


def blurred(image: Image.Image, boxes: Sequence[Sequence[float]], margin: float) -> Image.Image:
    """A copy of the image with blurred boxes.

    Args:
        boxes: left, top, right, bottom in pixels.
        margin: added at each edge, as a share of the box's width or height.
    """
    image = image.copy()
    for left, top, right, bottom in boxes:
        across, down = margin * (right - left), margin * (bottom - top)
        region = (
            max(0, int(left - across)),
            max(0, int(top - down)),
            min(image.width, int(np.ceil(right + across))),
            min(image.height, int(np.ceil(bottom + down))),
        )
        if region[0] < region[2] and region[1] < region[3]:
            radius = max(1.0, _BLUR * max(right - left, bottom - top))
            image.paste(image.crop(region).filter(ImageFilter.GaussianBlur(radius)), region)
    return image


def detect(detector: str, images: Sequence[PoolImage]) -> list[npt.NDArray[np.float64]]:
    """The faces that a detector finds, checked.

    Raises:
        UserError: no such class, it raised, or it answered something else than boxes.
    """
    found = _open(detector)
    try:
        answer = [np.asarray(boxes, np.float64) for boxes in found.detect([image.pixels for image in images])]
    except UserError:
        raise
    except Exception as error:  # whatever the detector does
        raise UserError(f"detector {detector}: detect raised {describe(error)}") from error
    if len(answer) != len(images):
        raise UserError(f"detector {detector}: detect returned {len(answer)} arrays for {len(images)} images")
    for boxes in answer:
        if boxes.ndim != 2 or boxes.shape[1] != 5 or not np.isfinite(boxes).all():
            raise UserError(f"detector {detector}: detect must return finite numbers (faces, 5), not {boxes.shape}")
    return answer


def _sources(detector: str) -> dict[str, str]:
    find_sources = getattr(_open(detector), "sources", None)
    return find_sources() if find_sources is not None else {}


@lru_cache
def _open(name: str) -> FaceDetector:
    try:
        detector = import_object(name)()
    except UserError as error:
        raise UserError(f"detector {error}") from None
    except Exception as error:  # whatever the constructor does
        raise UserError(f"detector {name}: constructing it failed: {describe(error)}") from error
    if not callable(getattr(detector, "detect", None)):
        raise UserError(f"detector {name}: must have a method detect(images); see docs/images.md")
    return detector
