"""Filters of images by the sides that their headers name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from mc2_hpc.curation.filtering.images import PoolImage, ScoreFilter


@dataclass(frozen=True, kw_only=True)
class Size(ScoreFilter):
    """Limits on the shorter side, in pixels: ``size_low``, ``size_high``."""

    reads_pixels: ClassVar[bool] = False

    def scores(self, rows: pa.Table, images: Sequence[PoolImage]) -> list[float]:
        """See :class:`ScoreFilter`."""
        return [min(image.width, image.height) for image in images]


@dataclass(frozen=True, kw_only=True)
class Aspect(ScoreFilter):
    """Limits on the longer side divided by the shorter one, which is at least 1: ``aspect_low``, ``aspect_high``."""

    reads_pixels: ClassVar[bool] = False

    def scores(self, rows: pa.Table, images: Sequence[PoolImage]) -> list[float]:
        """See :class:`ScoreFilter`."""
        return [max(image.width, image.height) / min(image.width, image.height) for image in images]
