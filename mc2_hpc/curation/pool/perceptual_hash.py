"""64-bit perceptual hashes of images, and the search for near ones.

The hash is pHash (the package imagehash): signs of the 8x8 lowest frequencies of the image's brightness at 32x32,
against their median. Rescaled, re-encoded and greyed copies differ in few bits; a copy that is cropped by some
percent differs in many, so benchmark images are hashed with their edges cut as well.
"""

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 1 << 26
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SMALLEST_SIDE = 256  # of a JPEG shrunk while decoding: eight times what the hash looks at
_PAIRS_AT_ONCE = 1 << 22

Hashes = npt.NDArray[np.uint64]


class UnreadableImage(ValueError):
    """Damaged, of no known format, or above 67 million pixels."""


def image_hashes(data: bytes, cuts: Sequence[float] = (0.0,)) -> Hashes:
    """The hash of an encoded image for each of ``cuts``, the share of its size that every edge loses; ``(cuts,)``.

    Raises:
        UnreadableImage: see there.
    """
    from imagehash import phash

    image = _decode(data)
    width, height = image.size
    hashes = np.empty(len(cuts), np.uint64)
    for index, cut in enumerate(cuts):
        box = (width * cut, height * cut, width * (1 - cut), height * (1 - cut))
        view = image.resize(image.size, Image.Resampling.BICUBIC, box=box) if cut else image
        hashes[index] = np.packbits(phash(view).hash).view(">u8")[0]
    return hashes


def nearest(hashes: Hashes, against: Hashes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """For each of ``hashes`` ``(n,)`` the number of the nearest of ``against`` ``(m,)`` and its distance in bits.

    Of equally near ones the first; m > 0. All pairs are compared, some millions at a time.
    """
    index, distance = np.empty(len(hashes), np.int64), np.empty(len(hashes), np.uint8)
    rows = max(1, _PAIRS_AT_ONCE // len(against))
    for begin in range(0, len(hashes), rows):
        block = slice(begin, begin + rows)
        bits = np.bitwise_count(hashes[block, None] ^ against)
        index[block] = bits.argmin(axis=1)
        distance[block] = np.take_along_axis(bits, index[block, None], axis=1)[:, 0]
    return index, distance


def _decode(data: bytes) -> Image.Image:
    """The image's brightness, a large JPEG shrunk."""
    grey = _decode_jpeg(data) if data.startswith(b"\xff\xd8") else None
    if grey is not None:
        return Image.fromarray(grey[:, :, 0])
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_pixels(*image.size)
            return image.convert("L")
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("no known image format") from None
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise UnreadableImage(str(error)) from None


def _decode_jpeg(data: bytes) -> npt.NDArray[np.uint8] | None:
    """None where simplejpeg finds damage or CMYK: Pillow decides."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height)
        return simplejpeg.decode_jpeg(data, "GRAY", min_height=_SMALLEST_SIDE, min_width=_SMALLEST_SIDE)
    except UnreadableImage:
        raise
    except ValueError:
        return None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width}x{height} are too many pixels")
