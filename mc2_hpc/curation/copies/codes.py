"""pHash codes of an image, robust to re-encoding, mirroring, cropping and captions.

The hash of a view is pHash: whether each of the 8x8 lowest frequencies of its brightness at 32x32 is above their
median. The bits that confirm it are whether each further frequency up to 16x16 is positive and more than noise.
Re-encoded, rescaled and grey copies differ in few bits, but a copy cropped by a few percent in many. So an image has a
code for each of several *views*, whole and with edges cut, each also mirrored: some view of a cropped copy, or of one
with a caption at its top or bottom, nearly coincides with some view of the original.

The arithmetic is on integers, so codes are the same on every machine.
"""

from itertools import product

import numpy as np
import numpy.typing as npt
from PIL import Image

from mc2_hpc.curation.copies.linking import CHECK_BITS, ENTRY, WORDS, Entries
from mc2_hpc.curation.pool.perceptual_hash import decode_grey
from mc2_hpc.draws import hash_keys, random_uint64
from mc2_hpc.images import MAX_PIXELS, load_rgb, open_image

EDGE = 0.04
"""The share of the image's size that is cut from an edge, or not, in every combination of the four."""
CAPTION = 0.21
"""The share of the height that is cut from the top, the bottom, or both."""

Box = tuple[float, float, float, float]
"""The shares of the image's size that are cut from its left, top, right and bottom."""

VIEWS: tuple[Box, ...] = (
    *((left, top, right, bottom) for left, top, right, bottom in product((0.0, EDGE), repeat=4)),
    *((0.0, CAPTION, 0.0, 0.0), (0.0, 0.0, 0.0, CAPTION), (0.0, CAPTION, 0.0, CAPTION)),
)

_SIDE, _LOW, _HIGH = 32, 8, 16
_INTERMEDIATE = 128
"""Images are first shrunk to this side, because each view is read from the whole image."""
_FLATTEST = 8
"""Least difference between the brightest and the darkest pixel of a view; below it, a hash is of noise."""
_LEAST = 1 / 256
"""Frequencies below this share of the root of all energy are noise: a smooth image has nothing else above 8x8."""
_SCALE = 1 << 14
_SHIFT = 20
"""Bits dropped before squaring, so that the energy fits into 64."""
_COSINES = np.rint(_SCALE * np.cos(np.pi * np.outer(np.arange(_HIGH), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE))).astype(
    np.int64
)
_IS_HIGH = ~np.pad(np.ones((_LOW, _LOW), bool), (0, _HIGH - _LOW))
_MIRROR = np.where(np.arange(_HIGH) % 2, -1, 1)
"""Signs of the columns' frequencies in the mirror image."""


def view_codes(data: bytes, views: tuple[Box, ...] = VIEWS, *, max_pixels: int = MAX_PIXELS) -> Entries:
    """The codes of an encoded image, with ``image`` 0: of each view, then of each view mirrored.

    Views of hardly any contrast have none. An image all of whose views are like this has one code, of its colour.

    Raises:
        Dropped: the image cannot be decoded, or is too large.
    """
    grey = decode_grey(data, max_pixels)
    if min(grey.size) > _INTERMEDIATE:
        grey = grey.resize((_INTERMEDIATE, _INTERMEDIATE), Image.Resampling.BOX)
    pixels = np.stack([_view(grey, box) for box in views])
    pixels = pixels[np.ptp(pixels, axis=(1, 2)) >= _FLATTEST]
    if not len(pixels):
        return _colour_code(data, max_pixels)
    frequencies = _COSINES @ pixels @ _COSINES.T
    entries = np.zeros(2 * len(pixels), ENTRY)
    entries["words"] = np.concatenate([_words(frequencies), _words(frequencies * _MIRROR)])
    entries["mirrored"][len(pixels) :] = 1
    return entries


def _view(grey: Image.Image, box: Box) -> npt.NDArray[np.int64]:
    width, height = grey.size
    left, top, right, bottom = box
    edges = (width * left, height * top, width * (1 - right), height * (1 - bottom))
    return np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, box=edges), np.int64)


def _words(frequencies: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Codes ``(n, WORDS)`` of frequencies ``(n, 16, 16)``, rows first."""
    low = frequencies[:, :_LOW, :_LOW].reshape(-1, _LOW * _LOW)
    ordered = np.sort(low, axis=1)
    twice_median = ordered[:, len(ordered[0]) // 2 - 1] + ordered[:, len(ordered[0]) // 2]
    high = (frequencies >> _SHIFT)[:, _IS_HIGH]
    energy = np.square(frequencies.reshape(len(low), -1)[:, 1:] >> _SHIFT).sum(axis=1)
    is_positive = high > _LEAST * np.sqrt(energy)[:, None]
    bits = np.concatenate([2 * low > twice_median[:, None], is_positive], axis=1)
    return pack_bits(bits)


def pack_bits(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """Bits ``(n, 64 * words)`` as ``(n, words)``, the first bit the highest of a word."""
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)


def _colour_code(data: bytes, max_pixels: int) -> Entries:
    """A code that only images of one, and the same, colour share."""
    image = load_rgb(open_image(data, max_pixels=max_pixels)).resize((1, 1), Image.Resampling.BOX)
    red, green, blue = (level // _FLATTEST for level in np.asarray(image)[0, 0].tolist())
    entries = np.zeros(1, ENTRY)
    name = hash_keys([f"{red} {green} {blue}"])
    for word in range(WORDS):
        entries["words"][:, word] = random_uint64(name, seed=0, epoch=word, purpose="colour")
    return entries


assert _IS_HIGH.sum() == CHECK_BITS
