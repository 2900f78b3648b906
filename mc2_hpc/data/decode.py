"""Encoded images to uint8 RGB tensors, by one of several backends.

===============  ======================================================  =================================  ==========
backend          JPEG                                                    resize                             used for
===============  ======================================================  =================================  ==========
``turbo``        simplejpeg, shrunk in the DCT to just above the target  torch, antialiased bicubic, uint8  training
``turbo_exact``  simplejpeg, in full                                     the same                           both
``pil``          Pillow                                                  Pillow: open_clip's, bit for bit   both
``dali``         NVIDIA's decoders, the crop alone (``data/dali.py``)    DALI, antialiased bicubic, uint8   training
===============  ======================================================  =================================  ==========

Images of other formats, told by their first bytes, and CMYK ones are decoded by Pillow in every backend. So is a JPEG
that simplejpeg refuses: Pillow is the judge of what is damaged, and the backends therefore skip the same samples.
Orientation tags are not applied, as in open_clip. Transparency is dropped.
"""

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from mc2_hpc.data.crop import Box, Encoded, EncodedCrop, dct_scaled, random_crop
from mc2_hpc.data.skips import SkipSample
from mc2_hpc.errors import UserError

MAX_PIXELS = 1 << 26
"""Largest image that is decoded, and largest one a resize may make: 67 million pixels, 200 MB of RGB."""

CPU_BACKENDS = ("turbo", "turbo_exact", "pil")
TRAIN_BACKENDS = (*CPU_BACKENDS, "dali")
EVAL_BACKENDS = ("turbo_exact", "pil")
AUTO = {"train": "turbo", "eval": "turbo_exact"}
_PIL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_START_OF_JPEG, _END_OF_JPEG = b"\xff\xd8", b"\xff\xd9"
logger = logging.getLogger(__name__)
# Of damaged metadata, which nobody here reads; it would be a line or two per image in every worker.
warnings.filterwarnings("ignore", module=r"PIL\.")

_RGB = npt.NDArray[np.uint8]


def resolve_backend(name: str, use: str) -> str:
    """The backend that ``name`` (perhaps ``auto``) means for ``use``: ``train`` or ``eval``.

    Raises:
        UserError: no such backend for that use, or its package is not installed.
    """
    if name == "auto":
        logger.info("decode for %s: auto is %s", use, AUTO[use])
        return AUTO[use]
    known = TRAIN_BACKENDS if use == "train" else EVAL_BACKENDS
    if name not in known:
        raise UserError(f"decode backend {name!r} cannot be used for {use}: choose one of auto, {', '.join(known)}")
    if name == "dali" and importlib.util.find_spec("nvidia.dali") is None:
        raise UserError("data.decode=dali: DALI is not installed: pip install 'mc2_hpc[dali]', or choose turbo")
    return name


class TrainTransform:
    """RandomResizedCrop to a square. Calls raise SkipSample for an image that cannot be used.

    With ``dali`` a JPEG whose header and end are in order is left encoded, for the rank's pipeline; anything else is
    decoded at once as by ``turbo_exact``, so that what can be told without decoding costs its sample here.
    """

    def __init__(self, image_size: int, crop_scale: tuple[float, float], seed: int, backend: str) -> None:
        self._size = image_size
        self._scale = crop_scale
        self._seed = seed
        self._backend = backend

    def __call__(self, data: Encoded, key_hash: np.uint64, epoch: int) -> torch.Tensor | EncodedCrop:
        """uint8 ``(3, size, size)``: the crop that (seed, epoch, key) choose; or what it is to be made from."""

        def choose(height: int, width: int) -> Box:
            return random_crop(height, width, key_hash=key_hash, seed=self._seed, epoch=epoch, scale=self._scale)

        if self._backend != "dali":
            return crop_and_resize(data, choose, self._size, self._backend)
        shape = _jpeg_shape(data)
        if shape is not None and data[-2:] == _END_OF_JPEG:
            return EncodedCrop(data, choose(*shape))
        return crop_and_resize(data, choose, self._size, "turbo_exact")


class EvalTransform:
    """The image as evaluation sees it: ``shortest`` side resized then centre crop, or all of it ``squash``ed."""

    def __init__(self, image_size: int, mode: str = "shortest", backend: str = "auto") -> None:
        if mode not in ("shortest", "squash"):
            raise UserError(f"eval transform {mode!r}: choose shortest or squash")
        self._size = image_size
        self._mode = mode
        self._backend = resolve_backend(backend, "eval")

    def __call__(self, data: Encoded) -> torch.Tensor:
        """uint8 ``(3, size, size)``. Raises SkipSample."""
        size = self._size
        if self._backend == "pil":
            image = _open(data)
            height, width = self._resized(image.height, image.width)
            tensor = _to_tensor(_loaded(image).resize((width, height), Image.Resampling.BICUBIC))
        else:
            rgb = _read(data)
            height, width = self._resized(rgb.shape[0], rgb.shape[1])
            tensor = _resize(rgb, Box(0, 0, rgb.shape[0], rgb.shape[1]), height, width)
        # torchvision's CenterCrop rounds half to even; so must we.
        top, left = round((height - size) / 2), round((width - size) / 2)
        return tensor[:, top : top + size, left : left + size]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        size = self._size
        if self._mode == "squash":
            return size, size
        short = min(height, width)
        resized = int(size * height / short), int(size * width / short)
        _check_pixels(*resized)
        return resized


def crop_and_resize(data: Encoded, choose: Callable[[int, int], Box], size: int, backend: str) -> torch.Tensor:
    """Decode, crop to the box that ``choose(height, width)`` gives, resize: uint8 ``(3, size, size)``.

    Raises:
        SkipSample: the image is damaged, of no known format, or too large.
    """
    if backend == "pil":
        image = _open(data)
        box = choose(image.height, image.width)
        corners = (box.left, box.top, box.left + box.width, box.top + box.height)
        return _to_tensor(_loaded(image).crop(corners).resize((size, size), Image.Resampling.BICUBIC))
    shape = _jpeg_shape(data)
    if shape is not None:
        box = choose(*shape)
        eighths, box = dct_scaled(box, size) if backend == "turbo" else (8, box)
        rgb = _decode_jpeg(data, shape, eighths)
        if rgb is not None:
            return _resize(rgb, Box(*(side * eighths // 8 for side in box)), size, size)
    rgb = np.array(_loaded(_open(data)))
    return _resize(rgb, choose(rgb.shape[0], rgb.shape[1]), size, size)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread meanwhile: an image is too small to share, and waking the others costs more than it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read(data: Encoded) -> _RGB:
    """The whole image, ``(height, width, 3)``."""
    shape = _jpeg_shape(data)
    rgb = _decode_jpeg(data, shape, 8) if shape is not None else None
    return rgb if rgb is not None else np.array(_loaded(_open(data)))


def _jpeg_shape(data: Encoded) -> tuple[int, int] | None:
    """Height and width, or None where this is nothing for simplejpeg."""
    if data[:2] != _START_OF_JPEG:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None  # Pillow decides, and names the damage
    if colours not in ("YCbCr", "RGB", "Gray"):
        return None
    _check_pixels(height, width)
    return height, width


def _decode_jpeg(data: Encoded, shape: tuple[int, int], eighths: int) -> _RGB | None:
    """The JPEG at ``eighths``/8 of its size, or None where simplejpeg finds damage."""
    height, width = (-(-side * eighths // 8) for side in shape)
    try:
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
    except ValueError:
        return None


def _open(data: Encoded) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_PIL_FORMATS)
    except Image.DecompressionBombError:
        raise SkipSample("too_many_pixels") from None
    except UnidentifiedImageError:
        raise SkipSample("undecodable_image", "no known image format") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise _damage(data, error) from None
    _check_pixels(image.height, image.width)
    return image


def _loaded(image: Image.Image) -> Image.Image:
    try:
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # as in _open
        raise _damage(_START_OF_JPEG if image.format in ("JPEG", "MPO") else b"", error) from None


def _damage(data: Encoded, error: Exception) -> SkipSample:
    truncated = data[:2] == _START_OF_JPEG and "truncated" in str(error).lower()
    return SkipSample("truncated_jpeg" if truncated else "undecodable_image", str(error))


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise SkipSample("too_many_pixels", f"{width}x{height}")


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _resize(rgb: _RGB, box: Box, height: int, width: int) -> torch.Tensor:
    part = torch.from_numpy(rgb)[box.top : box.top + box.height, box.left : box.left + box.width]
    return F.interpolate(part.permute(2, 0, 1)[None], size=(height, width), mode="bicubic", antialias=True)[0]
