"""Custom filters of images: a score with limits, and a reason to drop.

    PYTHONPATH=examples mc2 curate filter POOL --out OUT \\
        --filter image_filters.Sharpness least=4 --filter image_filters.NoBlankImages
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mc2_hpc.curation.filtering.images import PoolImage, ScoreFilter, per_image


class Sharpness(ScoreFilter):
    """The mean difference between neighbouring pixels, from 0 to 255: ``sharpness_low``, ``sharpness_high``."""

    def scores(self, rows: pa.Table, images: Sequence[PoolImage]) -> np.ndarray:
        return per_image(images, (self._score(image) for image in dict.fromkeys(images)))

    def _score(self, image: PoolImage) -> float:
        grey = np.asarray(image.pixels.convert("L"), np.float32)
        differences = [np.abs(np.diff(grey, axis=axis)).ravel() for axis in (0, 1)]
        return float(np.concatenate([*differences, [0]]).mean())  # one pixel has no neighbours


@dataclass(frozen=True)
class NoBlankImages:
    """Drops images in which almost every pixel has the same colour."""

    share: float = 0.99

    def drop_reasons(self, rows: pa.Table, images: Sequence[PoolImage]) -> list[str | None]:
        blank = {image: self._is_blank(image) for image in dict.fromkeys(images)}
        return ["blank" if blank[image] else None for image in images]

    def _is_blank(self, image: PoolImage) -> bool:
        pixels = np.asarray(image.pixels).reshape(-1, 3) // 8  # nearly the same counts as the same
        return np.unique(pixels, axis=0, return_counts=True)[1].max() >= self.share * len(pixels)
