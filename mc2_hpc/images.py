"""Decoding images to RGB with Pillow, in the same way for training, evaluation, search and curation.

Differences from Pillow's defaults:

- 16-bit grey (scans, depth maps) keeps its high byte, where ``convert("RGB")`` turns everything above 255 white;
- damaged metadata (EXIF, TIFF tags, palettes with transparency) causes no warnings;
- the limit on pixels is an argument, and a JPEG above it is decoded at a half or a quarter of its size.

Transparency is dropped. Animations give their first frame. Orientation tags are applied only with ``upright``:
training and evaluation ignore them, as open_clip does.
"""

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.reading.files import open_regular

MAX_PIXELS = 1 << 26
"""Default limit on decoded images: 67 million pixels, 200 MB of RGB."""
REDUCED = 8
"""How many times larger than the limit a JPEG decoded at a smaller scale may be: a progressive JPEG keeps all its
coefficients in memory, whatever the scale."""

MAX_FILE_BYTES = 1 << 29
"""Of an image file: more than :data:`MAX_PIXELS` take in any format, and little enough to read at once."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
"""Raster formats. Pillow's others run external programs (EPS) or do not occur on the web."""
_START_OF_JPEG = b"\xff\xd8"
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")

Image.MAX_IMAGE_PIXELS = None  # the limit here is exact, known to the caller, and counted
# About damaged metadata, which nothing here reads: a line or two per image in every worker.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image_file(path: str | Path) -> bytes:
    """An encoded image that is a file of its own.

    Raises:
        UserError: there is no such file, or it is a folder, pipe, socket or device.
        OSError: it cannot be read.
        Dropped: larger than :data:`MAX_FILE_BYTES`.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise Dropped(Drop.TOO_LARGE, f"{size:,} bytes")
        return stream.read(size)


def open_image(data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read only the image's header; :func:`load_rgb` reads its pixels.

    Args:
        max_pixels: a JPEG with up to :data:`REDUCED` times as many is decoded at a smaller scale.

    Raises:
        Dropped: unknown format, damaged, or too large.
    """
    return _opened(data, max_pixels)[0]


def image_size(data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image as it is stored, by its header: before its orientation tag is applied, and before
    :func:`open_image` reduces a large JPEG.

    Raises:
        Dropped: see :func:`open_image`.
    """
    return _opened(data, max_pixels)[1]


def _opened(data: bytes | memoryview, max_pixels: int) -> tuple[Image.Image, tuple[int, int]]:
    """An image by its header, reduced to at most ``max_pixels`` if it is a JPEG, and its size before that."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        size = image.size
        if max_pixels < image.width * image.height <= REDUCED * max_pixels:
            scale = 2 if image.width * image.height <= 4 * max_pixels else 4
            image.draft(None, (image.width // scale, image.height // scale))  # affects only JPEG
    except UnidentifiedImageError:
        raise Dropped(Drop.IMAGE_UNDECODABLE, "no known image format") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds of exceptions for damaged files
        raise _damage(bytes(data[:2]), error) from None
    if image.width * image.height > max_pixels:
        raise Dropped(Drop.IMAGE_TOO_LARGE, f"{image.width}x{image.height}")
    return image, size


def load_rgb(image: Image.Image, *, upright: bool = False) -> Image.Image:
    """The pixels of an image from :func:`open_image`, mode RGB.

    Args:
        upright: apply the orientation tag.

    Raises:
        Dropped: damaged.
    """
    try:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode in _SIXTEEN_BITS:
            image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no common scale")
        image.info.pop("transparency", None)
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # as in open_image
        raise _damage(_START_OF_JPEG if image.format in ("JPEG", "MPO") else b"", error) from None


def thumbnail(data: bytes | memoryview, side: int) -> bytes:
    """A JPEG of the image, upright, at most ``side`` pixels wide and high.

    Raises:
        Dropped: see :func:`open_image`.
    """
    image = open_image(data)
    image.draft("RGB", (2 * side, 2 * side))  # decode no more of a JPEG than the thumbnail needs
    image = load_rgb(image, upright=True)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def _damage(start: bytes, error: Exception) -> Dropped:
    truncated = start == _START_OF_JPEG and "truncated" in str(error).lower()
    return Dropped(Drop.IMAGE_TRUNCATED if truncated else Drop.IMAGE_UNDECODABLE, str(error))
