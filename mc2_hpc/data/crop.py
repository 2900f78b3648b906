"""The crop of an image that a training sample shows: RandomResizedCrop's rule, with hashes for random numbers."""

import math
from typing import NamedTuple

import numpy as np

from mc2_hpc.draws import uniform

_TRIES = 10
_RATIO = (3 / 4, 4 / 3)
_SPREAD = np.arange(4 * _TRIES, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
# Decoding at 3, 5, 6 or 7 eighths has no SIMD code in libjpeg-turbo and is slower than decoding at full size.
_DCT_EIGHTHS = (1, 2, 4)


Encoded = bytes | memoryview
"""The bytes of an image file; a view if it was read together with adjacent files."""


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


class EncodedCrop(NamedTuple):
    """A JPEG that is not decoded yet, and its crop."""

    data: Encoded
    box: Box


def random_crop(
    height: int, width: int, *, key_hash: np.uint64, seed: int, epoch: int, scale: tuple[float, float]
) -> Box:
    """The box torchvision's RandomResizedCrop would choose, with these draws in place of a generator.

    The area is uniform in ``scale`` of the image's area and the aspect ratio is log-uniform in [3/4, 4/3]. After ten
    tries without a box that fits, the largest centred box with a permitted ratio is used. A pure function.
    """
    with np.errstate(over="ignore"):
        words = key_hash + _SPREAD
    draws = uniform(words, seed=seed, epoch=epoch, purpose="crop").tolist()
    log_low, log_high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for i in range(0, len(draws), 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[i])
        ratio = math.exp(log_low + (log_high - log_low) * draws[i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(draws[i + 2] * (height - h + 1)), int(draws[i + 3] * (width - w + 1)), h, w)
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    w, h = (width, max(1, round(width / ratio))) if width / height < ratio else (max(1, round(height * ratio)), height)
    return Box((height - h) // 2, (width - w) // 2, h, w)


def dct_scaled(box: Box, size: int) -> tuple[int, Box]:
    """How far a JPEG can be shrunk while decoding: eighths, and ``box`` in the pixels of that scale.

    The smallest of 1/8, 1/4, 1/2 at which the box still has ``size`` pixels on each side, otherwise 8 eighths. The box
    is snapped (by at most 7 pixels) to multiples of the pixels that one shrunken pixel covers. Without snapping, the
    image would shift by a fraction of a pixel from the reference, which costs 10 dB.
    """
    for eighths in _DCT_EIGHTHS:
        grid = 8 // eighths
        snapped = Box(*(side // grid * grid for side in box))
        if min(snapped.height, snapped.width) // grid >= size:
            return eighths, snapped
    return 8, box
