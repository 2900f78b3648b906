"""Images of the numbers 0-99, composed from photographs of handwritten digits.

scikit-learn includes 1,797 handwritten digits by 13 writers (the test part of UCI's *optdigits*: 8x8 pixels, 17 grey
levels), in the order in which they were collected. Splitting that order in two keeps nearly every writer on one side,
so the held-out digits come from other writers than the training digits.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

TRAIN_DIGITS = 1300
"""The first 1,300 digits are for training; the remaining 497 are held out."""

SIDES = (48, 56, 64)
"""Side lengths of the square images in pixels."""

_JPEG_QUALITY = 90


@dataclass(frozen=True)
class HandwrittenDigits:
    """Digit photographs by class: ``by_class[d]`` is uint8 ``(n_d, 8, 8)``, ink = 255."""

    by_class: tuple[npt.NDArray[np.uint8], ...]


def load_handwriting() -> tuple[HandwrittenDigits, HandwrittenDigits]:
    """The bundled digits as (training part, held-out part)."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    ink = np.round(bundle.images * (255 / 16)).astype(np.uint8)
    parts = []
    for part in (slice(0, TRAIN_DIGITS), slice(TRAIN_DIGITS, None)):
        images, target = ink[part], bundle.target[part]
        parts.append(HandwrittenDigits(tuple(images[target == digit] for digit in range(10))))
    return parts[0], parts[1]


def draw_number(number: int, digits: HandwrittenDigits, rng: np.random.Generator) -> bytes:
    """A JPEG of ``number`` (0-99) in one of :data:`SIDES`, with random handwriting, position, size and colours."""
    side = int(rng.choice(SIDES))
    return simplejpeg.encode_jpeg(
        _colour(_ink(number, digits, side, rng), rng), quality=_JPEG_QUALITY, colorspace="RGB", colorsubsampling="420"
    )


def _ink(number: int, digits: HandwrittenDigits, side: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """How much ink covers each pixel, float32 ``(side, side)`` in [0, 1]."""
    figures = [int(figure) for figure in str(number)]
    height = side * rng.uniform(0.58, 0.66)
    width = height * rng.uniform(0.66, 0.74)
    glyphs = [_glyph(digits.by_class[figure], width, height, rng) for figure in figures]
    step = width * rng.uniform(0.98, 1.04)
    left = (side - width - step * (len(glyphs) - 1)) / 2 + side * rng.uniform(-0.03, 0.03)
    top = (side - height) / 2 + side * rng.uniform(-0.03, 0.03)
    canvas = np.zeros((side, side), np.float32)
    for position, glyph in enumerate(glyphs):
        _stamp(canvas, glyph, top + side * rng.uniform(-0.015, 0.015), left + step * position)
    return canvas


def _glyph(
    candidates: npt.NDArray[np.uint8], width: float, height: float, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    photo = Image.fromarray(candidates[rng.integers(len(candidates))])
    size = (max(4, round(width * rng.uniform(0.94, 1.06))), max(4, round(height * rng.uniform(0.94, 1.06))))
    large = photo.resize(size, Image.Resampling.BICUBIC)
    turned = large.rotate(rng.uniform(-4, 4), Image.Resampling.BILINEAR)
    return np.asarray(turned, np.float32) / np.float32(255)


def _stamp(canvas: npt.NDArray[np.float32], glyph: npt.NDArray[np.float32], top: float, left: float) -> None:
    """Draw ``glyph`` on the canvas, clipped at its edges."""
    side = canvas.shape[0]
    y, x = round(top), round(left)
    y0, x0 = max(y, 0), max(x, 0)
    y1, x1 = min(y + glyph.shape[0], side), min(x + glyph.shape[1], side)
    region = canvas[y0:y1, x0:x1]
    np.maximum(region, glyph[y0 - y : y1 - y, x0 - x : x1 - x], out=region)


def _colour(ink: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Chalk on coloured card, with uneven light and a little grain: uint8 ``(side, side, 3)``.

    Card of medium brightness is close to 0 after normalisation. White paper would dominate the patch embedding, and a
    small transformer would spend its first few hundred steps learning to ignore it.
    """
    side = ink.shape[0]
    card = rng.uniform(105, 135) + rng.uniform(-25, 25, 3)
    chalk = rng.uniform(225, 255, 3)
    strength = np.clip(ink * rng.uniform(1.0, 1.35), 0, 1)[..., None]
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    shade = 1 + rng.uniform(-0.06, 0.06) * ramp[:, None] + rng.uniform(-0.06, 0.06) * ramp[None, :]
    grain = rng.standard_normal((side, side), np.float32) * rng.uniform(0.5, 3.0)
    pixels = (card + (chalk - card) * strength) * shade[..., None] + grain[..., None]
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
