"""Filters of images: what they receive, and what they implement.

A filter of captions has one method ``drop_reasons(rows)`` (:mod:`mc2_hpc.curation.filters`). One that also sees the
images has either of

- ``drop_reasons(rows, images)``: a reason per row (:class:`ImageFilter`);
- ``scores(rows, images)``: a number per row, and limits for it (:class:`ScoreFilter`).

``images`` has one :class:`PoolImage` per row. Captions of one image share the object, so ``dict.fromkeys(images)`` has
each image once.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from mc2_hpc.curation.fetching.stored import encoded
from mc2_hpc.errors import UserError
from mc2_hpc.images import image_size, load_rgb, open_image


class PoolImage:
    """An image of a pool.

    Args:
        key: of its captions.
        name: of its file in a tar.
        data: encoded.

    Raises:
        Dropped: its header cannot be read, or it has too many pixels.
    """

    def __init__(self, key: str, name: str, data: bytes) -> None:
        self.key = key
        self.name = name
        self.data = data
        self.width, self.height = image_size(data)
        """Of the image as it is stored, before its orientation tag is applied."""
        self.change: str | None = None
        """How a filter changed it; None if its bytes are as they were."""

    @cached_property
    def pixels(self) -> Image.Image:
        """The image upright, in RGB. It never fails in a filter with ``reads_pixels``."""
        return load_rgb(open_image(self.data), upright=True)

    def replace(self, pixels: Image.Image, change: str) -> None:
        """Write these pixels instead: as a JPEG, by the rule that fetching has for images that do not keep their bytes.

        Args:
            pixels: RGB, upright.
            change: what was done, in the form of a reason, such as ``faces_blurred``.
        """
        stored = encoded(np.asarray(pixels))
        self.data, self.width, self.height = stored.data, stored.width, stored.height
        self.name = f"{self.key}.{stored.extension}"
        self.change = change
        self.__dict__["pixels"] = pixels


class ImageFilter(Protocol):
    """Decides by images which captions to drop; an image without captions is dropped too.

    Created once per process. Its results must depend only on the row and its image. It may change an image with
    :meth:`PoolImage.replace`; later filters see the changed one.
    """

    reads_pixels: ClassVar[bool] = True
    """If false, images need not be decodable: only ``data``, ``width`` and ``height`` are used."""

    def drop_reasons(self, rows: pa.Table, images: Sequence[PoolImage]) -> Iterable[str | None] | pa.Array:
        """A reason per row, in row order; None keeps the row.

        Args:
            rows: ``key``, ``text``, ``lang`` (empty if unknown) and, if the pool has it, ``source``; all captions that
                are still kept of up to 64 images. At least one.
            images: of each row.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ScoreFilter:
    """Base class of filters with a number per row: drops rows below ``least`` as ``<name>_low``, above ``most`` as
    ``<name>_high``. The scores are recorded, so that limits can be chosen by looking at them."""

    reads_pixels: ClassVar[bool] = True
    """See :class:`ImageFilter`."""

    least: float | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        if self.least is None and self.most is None:
            raise UserError("give least=NUMBER, most=NUMBER, or both")
        if self.least is not None and self.most is not None and self.most < self.least:
            raise UserError(f"nothing is from {self.least:g} to {self.most:g}")

    @property
    def name(self) -> str:
        """Of the score: the class's name in lower case, such as ``clip_score``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def scores(self, rows: pa.Table, images: Sequence[PoolImage]) -> Sequence[float] | npt.NDArray[Any]:
        """A finite number per row; arguments as for :meth:`ImageFilter.drop_reasons`."""
        raise NotImplementedError

    def sources(self) -> dict[str, str]:
        """Digests of the files that scores depend on, by name; recorded, and the same in every run on a folder."""
        return {}


def per_image(images: Sequence[PoolImage], values: Iterable[float]) -> npt.NDArray[np.float64]:
    """Scores of rows from scores of images.

    Args:
        images: of each row.
        values: of each image of ``dict.fromkeys(images)``.
    """
    found = dict(zip(dict.fromkeys(images), values, strict=True))
    return np.array([found[image] for image in images], np.float64)
