"""Encoded images to uint8 RGB tensors, with one of several backends.

===============  ======================================================  =================================  ==========
backend          JPEG                                                    resize                             used for
===============  ======================================================  =================================  ==========
``turbo``        simplejpeg, shrunk in the DCT to just above the target  torch, antialiased bicubic, uint8  training
``turbo_exact``  simplejpeg, in full                                     the same                           both
``pil``          Pillow                                                  Pillow: open_clip's, bit for bit   both
``dali``         NVIDIA's decoders, only the crop (``data/dali.py``)     DALI, antialiased bicubic, uint8   training
===============  ======================================================  =================================  ==========

Images in other formats, recognised by their first bytes, and CMYK images are decoded by Pillow in every backend. So are
JPEGs that simplejpeg refuses: Pillow decides what is damaged, so all backends skip the same samples. Orientation tags
are not applied, as in open_clip. Transparency is dropped.
"""

import importlib.util
import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from mc2_hpc.data.crop import Box, Encoded, EncodedCrop, dct_scaled, random_crop
from mc2_hpc.data.teacher import TwoSizes
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.images import MAX_PIXELS, load_rgb, open_image

CPU_BACKENDS = ("turbo", "turbo_exact", "pil")
TRAIN_BACKENDS = (*CPU_BACKENDS, "dali")
EVAL_BACKENDS = ("turbo_exact", "pil")
AUTO = {"train": "turbo", "eval": "turbo_exact"}
_START_OF_JPEG, _END_OF_JPEG = b"\xff\xd8", b"\xff\xd9"
logger = logging.getLogger(__name__)

_RGB = npt.NDArray[np.uint8]


def resolve_backend(name: str, use: str) -> str:
    """The backend that ``name`` (which may be ``auto``) means for ``use``: ``train`` or ``eval``.

    Raises:
        UserError: no such backend for that use, or its package is not installed.
    """
    if name == "auto":
        logger.info("decode for %s: auto is %s", use, AUTO[use])
        return AUTO[use]
    known = TRAIN_BACKENDS if use == "train" else EVAL_BACKENDS
    if name not in known:
        raise UserError(f"decode backend {name!r} cannot be used for {use}: choose one of auto, {', '.join(known)}")
    if name == "dali" and not has_dali():
        raise UserError("data.decode=dali: DALI is not installed: pip install 'mc2_hpc[dali]', or choose turbo")
    return name


def has_dali() -> bool:
    """Whether DALI is installed."""
    # Looking for a part of a package that is missing itself is an error.
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class TrainTransform:
    """RandomResizedCrop to a square. Calls raise Dropped for an image that cannot be used.

    With ``dali``, a JPEG with an intact header and end stays encoded for the rank's pipeline. Anything else is decoded
    immediately as by ``turbo_exact``, so that samples that are visibly bad without decoding are skipped here.
    """

    def __init__(
        self,
        image_size: int,
        crop_scale: tuple[float, float],
        seed: int,
        backend: str,
        max_pixels: int = MAX_PIXELS,
        *,
        teacher_size: int | None = None,
    ) -> None:
        """
        Args:
            teacher_size: also resize every crop to this size, for a teacher; not with ``dali``.
        """
        self._size = image_size
        self._teacher_size = teacher_size
        self._scale = crop_scale
        self._seed = seed
        self._backend = backend
        self._max_pixels = max_pixels

    def __call__(self, data: Encoded, key_hash: np.uint64, epoch: int) -> torch.Tensor | EncodedCrop | TwoSizes:
        """uint8 ``(3, size, size)``: the crop chosen by (seed, epoch, key), in two sizes for a teacher; or a JPEG with
        its crop."""

        def choose(height: int, width: int) -> Box:
            return random_crop(height, width, key_hash=key_hash, seed=self._seed, epoch=epoch, scale=self._scale)

        if self._teacher_size is not None:
            sizes = (self._size, self._teacher_size)
            return TwoSizes(*crop_and_resize_to_each(data, choose, sizes, self._backend, self._max_pixels))
        if self._backend != "dali":
            return crop_and_resize(data, choose, self._size, self._backend, self._max_pixels)
        shape = _jpeg_shape(data)
        if shape is not None and _fits(shape, self._max_pixels) and data[-2:] == _END_OF_JPEG:
            return EncodedCrop(data, choose(*shape))
        return crop_and_resize(data, choose, self._size, "turbo_exact", self._max_pixels)


class EvalTransform:
    """The image as evaluation sees it: ``shortest`` side resized, then centre crop; or the whole image ``squash``ed."""

    def __init__(
        self, image_size: int, mode: str = "shortest", backend: str = "auto", max_pixels: int = MAX_PIXELS
    ) -> None:
        if mode not in ("shortest", "squash"):
            raise UserError(f"eval transform {mode!r}: choose shortest or squash")
        self._size = image_size
        self._mode = mode
        self._backend = resolve_backend(backend, "eval")
        self._max_pixels = max_pixels

    def __call__(self, data: Encoded | Image.Image) -> torch.Tensor:
        """uint8 ``(3, size, size)`` of an encoded image, or of an open one. Raises Dropped."""
        size = self._size
        if self._backend == "pil":
            image = data if isinstance(data, Image.Image) else open_image(data, max_pixels=self._max_pixels)
            height, width = self._resized(image.height, image.width)
            tensor = _to_tensor(load_rgb(image).resize((width, height), Image.Resampling.BICUBIC))
        else:
            rgb = np.array(load_rgb(data)) if isinstance(data, Image.Image) else _read(data, self._max_pixels)
            height, width = self._resized(rgb.shape[0], rgb.shape[1])
            tensor = _resize(rgb, Box(0, 0, rgb.shape[0], rgb.shape[1]), height, width)
        # torchvision's CenterCrop rounds half to even, so this must too.
        top, left = round((height - size) / 2), round((width - size) / 2)
        return tensor[:, top : top + size, left : left + size]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        size = self._size
        if self._mode == "squash":
            return size, size
        short = min(height, width)
        resized = int(size * height / short), int(size * width / short)
        if not _fits(resized, self._max_pixels):
            raise Dropped(Drop.IMAGE_TOO_LARGE, f"{width}x{height} resized to {resized[1]}x{resized[0]}")
        return resized


def crop_and_resize(
    data: Encoded, choose: Callable[[int, int], Box], size: int, backend: str, max_pixels: int = MAX_PIXELS
) -> torch.Tensor:
    """Decode, crop to the box from ``choose(height, width)``, and resize: uint8 ``(3, size, size)``.

    Raises:
        Dropped: the image is damaged, in an unknown format, or too large.
    """
    return crop_and_resize_to_each(data, choose, (size,), backend, max_pixels)[0]


def crop_and_resize_to_each(
    data: Encoded,
    choose: Callable[[int, int], Box],
    sizes: Sequence[int],
    backend: str,
    max_pixels: int = MAX_PIXELS,
) -> list[torch.Tensor]:
    """:func:`crop_and_resize` to several sizes, decoding once: at the scale that the largest of them needs."""
    if backend == "pil":
        image = open_image(data, max_pixels=max_pixels)
        box = choose(image.height, image.width)
        crop = load_rgb(image).crop((box.left, box.top, box.left + box.width, box.top + box.height))
        return [_to_tensor(crop.resize((size, size), Image.Resampling.BICUBIC)) for size in sizes]
    shape = _jpeg_shape(data)
    if shape is not None and _fits(shape, max_pixels):
        box = choose(*shape)
        eighths, box = dct_scaled(box, max(sizes)) if backend == "turbo" else (8, box)
        rgb = _decode_jpeg(data, shape, eighths)
        if rgb is not None:
            box = Box(*(side * eighths // 8 for side in box))
            return [_resize(rgb, box, size, size) for size in sizes]
    rgb = _read(data, max_pixels)
    box = choose(rgb.shape[0], rgb.shape[1])
    return [_resize(rgb, box, size, size) for size in sizes]


def decode_pil(data: Encoded) -> Image.Image:
    """The whole image decoded by Pillow, RGB, as other libraries' transforms expect it. Raises Dropped."""
    return load_rgb(open_image(data))


def _read(data: Encoded, max_pixels: int) -> _RGB:
    """The whole image, ``(height, width, 3)``; a JPEG with too many pixels at a smaller scale, as in ``images``."""
    shape = _jpeg_shape(data)
    if shape is not None and _fits(shape, max_pixels):
        rgb = _decode_jpeg(data, shape, 8)
        if rgb is not None:
            return rgb
    return np.array(load_rgb(open_image(data, max_pixels=max_pixels)))


def _fits(shape: tuple[int, int], max_pixels: int) -> bool:
    return shape[0] * shape[1] <= max_pixels


def _jpeg_shape(data: Encoded) -> tuple[int, int] | None:
    """Height and width, or None if simplejpeg cannot decode it."""
    if data[:2] != _START_OF_JPEG:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None  # Pillow decides, and names the damage
    return (height, width) if colours in ("YCbCr", "RGB", "Gray") else None


def _decode_jpeg(data: Encoded, shape: tuple[int, int], eighths: int) -> _RGB | None:
    """The JPEG at ``eighths``/8 of its size, or None if simplejpeg finds damage."""
    height, width = (-(-side * eighths // 8) for side in shape)
    try:
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
    except ValueError:
        return None


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _resize(rgb: _RGB, box: Box, height: int, width: int) -> torch.Tensor:
    part = torch.from_numpy(rgb)[box.top : box.top + box.height, box.left : box.left + box.width]
    return F.interpolate(part.permute(2, 0, 1)[None], size=(height, width), mode="bicubic", antialias=True)[0]
