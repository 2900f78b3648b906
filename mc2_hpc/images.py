"""Encoded images to RGB by Pillow: one way for training, evaluation, search and curation.

What Pillow does by itself and this does otherwise:

- 16-bit grey (scans, depth maps) keeps its high byte, where ``convert("RGB")`` turns everything above 255 white;
- damaged metadata (EXIF, TIFF tags, palettes with transparency) costs no line of warning per image;
- the limit on pixels is an argument, and a JPEG above it is decoded at a half or a quarter of its size.

Transparency is dropped. Of animations the first frame counts. Orientation tags are applied where ``upright`` asks:
training and evaluation leave them, as open_clip does.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mc2_hpc.drops import Drop, Dropped

MAX_PIXELS = 1 << 26
"""Largest image that is decoded unless told otherwise: 67 million pixels, 200 MB of RGB."""
REDUCED = 8
"""How many times larger a JPEG may be that is decoded at a smaller scale: a progressive one has all its coefficients in
memory, whatever the scale."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
"""Raster formats. Pillow's others would run programs (EPS), or are no images of the web."""
_START_OF_JPEG = b"\xff\xd8"
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")

Image.MAX_IMAGE_PIXELS = None  # the limit here is exact, known to the caller, and counted
# Of damaged metadata, which nobody here reads; it would be a line or two per image in every worker.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with its header read and its pixels not yet; :func:`load_rgb` reads them.

    Args:
        max_pixels: a JPEG with up to :data:`REDUCED` times as many is to be decoded at a smaller scale.

    Raises:
        Dropped: of no known format, damaged, or too large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if max_pixels < image.width * image.height <= REDUCED * max_pixels:
            scale = 2 if image.width * image.height <= 4 * max_pixels else 4
            image.draft(None, (image.width // scale, image.height // scale))  # changes JPEG alone
    except UnidentifiedImageError:
        raise Dropped(Drop.IMAGE_UNDECODABLE, "no known image format") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise _damage(bytes(data[:2]), error) from None
    if image.width * image.height > max_pixels:
        raise Dropped(Drop.IMAGE_TOO_LARGE, f"{image.width}x{image.height}")
    return image


def load_rgb(image: Image.Image, *, upright: bool = False) -> Image.Image:
    """The pixels of an image from :func:`open_image`, mode RGB.

    Args:
        upright: turn it as its orientation tag says.

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
    image.draft("RGB", (2 * side, 2 * side))  # of a JPEG: decode no more than the thumbnail needs
    image = load_rgb(image, upright=True)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def _damage(start: bytes, error: Exception) -> Dropped:
    truncated = start == _START_OF_JPEG and "truncated" in str(error).lower()
    return Dropped(Drop.IMAGE_TRUNCATED if truncated else Drop.IMAGE_UNDECODABLE, str(error))
