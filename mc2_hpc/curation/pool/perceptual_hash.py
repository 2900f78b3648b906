"""64-bit perceptual hashes of images, and the search for near matches.

The hash is pHash (from the imagehash package): whether each of the 8x8 lowest frequencies of the image's brightness at
32x32 is above their median. Rescaled, re-encoded and grey copies differ in few bits. A copy cropped by a few percent
differs in many, so benchmark images are also hashed with their edges cut.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from mc2_hpc.images import MAX_PIXELS, load_rgb, open_image

_SMALLEST_SIDE = 256  # of a JPEG shrunk while decoding: eight times what the hash uses
_PAIRS_AT_ONCE = 1 << 22

Hashes = npt.NDArray[np.uint64]


def image_hashes(data: bytes, cuts: Sequence[float] = (0.0,), *, max_pixels: int = MAX_PIXELS) -> Hashes:
    """The hash of an encoded image for each of ``cuts``, the share of its size cut from every edge; ``(cuts,)``.

    Raises:
        Dropped: the image cannot be decoded, or is too large.
    """
    from imagehash import phash

    image = decode_grey(data, max_pixels)
    width, height = image.size
    hashes = np.empty(len(cuts), np.uint64)
    for index, cut in enumerate(cuts):
        box = (width * cut, height * cut, width * (1 - cut), height * (1 - cut))
        view = image.resize(image.size, Image.Resampling.BICUBIC, box=box) if cut else image
        hashes[index] = np.packbits(phash(view).hash).view(">u8")[0]
    return hashes


def nearest(hashes: Hashes, against: Hashes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """For each of ``hashes`` ``(n,)``, the index of the nearest in ``against`` ``(m,)`` and its distance in bits.

    Ties go to the first; m > 0. All pairs are compared, a few million at a time.
    """
    index, distance = np.empty(len(hashes), np.int64), np.empty(len(hashes), np.uint8)
    rows = max(1, _PAIRS_AT_ONCE // len(against))
    for begin in range(0, len(hashes), rows):
        block = slice(begin, begin + rows)
        bits = np.bitwise_count(hashes[block, None] ^ against)
        index[block] = bits.argmin(axis=1)
        distance[block] = np.take_along_axis(bits, index[block, None], axis=1)[:, 0]
    return index, distance


def decode_grey(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image's brightness, a large JPEG shrunk.

    Raises:
        Dropped: the image cannot be decoded, or is too large.
    """
    grey = _decode_jpeg(data, max_pixels) if data.startswith(b"\xff\xd8") else None
    if grey is not None:
        return Image.fromarray(grey[:, :, 0])
    return load_rgb(open_image(data, max_pixels=max_pixels)).convert("L")


def _decode_jpeg(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8] | None:
    """None if simplejpeg finds damage or CMYK, or the image is too large for it: Pillow decides."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > max_pixels:
            return None
        return simplejpeg.decode_jpeg(data, "GRAY", min_height=_SMALLEST_SIDE, min_width=_SMALLEST_SIDE)
    except ValueError:
        return None
