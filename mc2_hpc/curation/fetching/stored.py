"""The bytes that are stored for an image: those of the server, or a smaller JPEG.

Only the content decides what an image is; the server's ``Content-Type`` and the address play no part. Without resizing,
only headers are read. With it, there is one rule: a JPEG that is upright, has YCbCr, RGB or grey pixels and fits is
kept byte for byte, and everything else becomes an upright RGB JPEG of quality 90 whose longest side is at most as
given. No image is enlarged. Reducing is the one thing in curation that needs torch.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, features

from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.images import MAX_PIXELS, image_size, load_rgb, open_image

EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "AVIF": "avif",
    "BMP": "bmp",
    "DIB": "bmp",
    "TIFF": "tiff",
    "JPEG2000": "jp2",
    "ICO": "ico",
}
"""Pillow's names of the formats that are stored, and how their files are named. A format without a signature of its own
(TGA) or that the web does not use (PPM) is more likely something else."""
FORMATS = tuple(dict.fromkeys(EXTENSIONS.values()))

_QUALITY = 90
_PLAIN = ("YCbCr", "RGB", "Gray")
_ORIENTATION = 0x0112
_HEADER = 1 << 16
_TAIL = 1 << 12
"""Bytes at the end in which a JPEG's end is looked for: cameras and editors append some of their own."""
_MOST_SCANS = 100
"""Scans of a JPEG that is decoded: encoders write about ten, and each costs time in proportion to the whole image."""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class StoredImage(NamedTuple):
    """An image as it is stored."""

    data: bytes
    extension: str
    width: int
    height: int


def store(body: bytes, longest: int | None) -> StoredImage:
    """What to store of a response's body.

    Args:
        longest: side in pixels that the image is reduced to; None keeps the bytes.

    Raises:
        Dropped: ``not_an_image``, ``image_unsupported``, ``image_too_large``, ``image_truncated`` or
            ``image_undecodable``.
    """
    kept = kept_jpeg(body, longest)
    if kept is not None:
        return kept
    _check_scans(body)
    if longest is None:
        image, extension = _opened(body)
        if not looks_whole(body, extension):
            load_rgb(image)  # finds out, and raises
        return StoredImage(body, extension, *image_size(body))
    shape = plain_jpeg_shape(body)
    if shape is not None and max(shape) > longest and shape[0] * shape[1] <= MAX_PIXELS and not is_turned(body):
        small = _small_jpeg(body, shape, longest)
        if small is not None:
            return small
    image, _ = _opened(body)
    width, height = _reduced(image.width, image.height, longest)
    image.draft(None, (width, height))  # affects only JPEG
    upright = load_rgb(image, upright=True)
    if upright.size != image.size:  # turned by a quarter
        width, height = height, width
    return encoded(_reduced_to(np.array(upright), width, height))


def kept_jpeg(body: bytes, longest: int | None) -> StoredImage | None:
    """The image if it is a JPEG that is surely kept byte for byte, by its header and end alone; None if :func:`store`
    has to look closer."""
    shape = plain_jpeg_shape(body)
    if shape is None or shape[0] * shape[1] > MAX_PIXELS or not looks_whole(body, "jpg"):
        return None
    if longest is not None and (max(shape) > longest or is_turned(body)):
        return None
    return StoredImage(body, "jpg", shape[1], shape[0])


def plain_jpeg_shape(body: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that simplejpeg decodes without converting its colours; None for anything else."""
    if body[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(body)
    except ValueError:
        return None
    return (height, width) if colours in _PLAIN and height > 0 and width > 0 else None


def looks_whole(body: bytes, extension: str) -> bool:
    """Whether an image has its end; False may also mean that other bytes follow the end, so that only decoding can
    tell."""
    if extension == "jpg":
        return b"\xff\xd9" in body[-_TAIL:]
    if extension == "png":
        return body[-8:-4] == b"IEND"
    if extension == "webp":
        return len(body) >= 8 + int.from_bytes(body[4:8], "little")
    if extension == "gif":
        return body.rstrip(b"\0").endswith(b";")
    return False


def _opened(body: bytes) -> tuple[Image.Image, str]:
    """The image by its header, and the extension of its format."""
    try:
        image = open_image(body)
    except Dropped as dropped:
        if dropped.reason == Drop.IMAGE_UNDECODABLE:
            raise _unknown(body) or dropped from None
        raise
    extension = EXTENSIONS.get(image.format or "")
    if extension is None:
        raise Dropped(Drop.NOT_AN_IMAGE, f"{image.format}")
    return image, extension


def _unknown(body: bytes) -> Dropped | None:
    """Why Pillow cannot open this; None if it is a damaged image of a known format."""
    start = body[:32].lstrip()
    if body[4:8] == b"ftyp" and b"avif" in body[8:64]:
        return None if features.check("avif") else Dropped(Drop.IMAGE_UNSUPPORTED, "AVIF")
    if body[4:8] == b"ftyp" and body[8:12] in _HEIF_BRANDS:
        return Dropped(Drop.IMAGE_UNSUPPORTED, "HEIF")
    if body.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return Dropped(Drop.IMAGE_UNSUPPORTED, "JPEG XL")
    if start.startswith((b"<svg", b"<?xml")) and b"<svg" in body[:4096]:
        return Dropped(Drop.IMAGE_UNSUPPORTED, "SVG")
    known = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")
    if body.startswith(known) or (body[:4] == b"RIFF" and body[8:12] == b"WEBP"):
        return None
    return Dropped(Drop.NOT_AN_IMAGE)


def _check_scans(body: bytes) -> None:
    if body[:2] == b"\xff\xd8" and body.count(b"\xff\xda") > _MOST_SCANS:
        raise Dropped(Drop.IMAGE_UNDECODABLE, f"more than {_MOST_SCANS} scans")


def is_turned(body: bytes) -> bool:
    """Whether a JPEG has an orientation tag other than upright; False if the tag cannot be read."""
    if b"Exif\0\0" not in body[:_HEADER]:
        return False
    try:
        return open_image(body).getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged metadata, which Pillow reports by many kinds of exceptions
        return False


def _small_jpeg(body: bytes, shape: tuple[int, int], longest: int) -> StoredImage | None:
    """A JPEG reduced to ``longest``, decoded at a half, a quarter or an eighth if that is large enough; None if
    simplejpeg finds damage.

    libjpeg-turbo has fast code for these sizes alone, so others of its eighths cost more than they save.
    """
    width, height = _reduced(shape[1], shape[0], longest)
    factor = next(k for k in (8, 4, 2, 1) if shape[1] // k >= width and shape[0] // k >= height)
    try:
        rgb = simplejpeg.decode_jpeg(body, min_height=-(-shape[0] // factor), min_width=-(-shape[1] // factor))
    except ValueError:
        return None
    return encoded(_reduced_to(rgb, width, height))


def _reduced_to(rgb: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    """An antialiased bilinear reduction of ``[height, width, 3]`` pixels.

    PyTorch's, which equals Pillow's to one level and is vectorised on processors with AVX2.
    """
    if rgb.shape[:2] == (height, width):
        return rgb
    # Not at the top: importing torch takes seconds, which fetching without resizing need not spend.
    import torch

    from mc2_hpc.threads import one_torch_thread

    planes = torch.from_numpy(rgb).permute(2, 0, 1)[None]
    with one_torch_thread():
        small = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
        return torch.stack(tuple(small[0]), -1).numpy()


def _reduced(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height with the same proportions and the given longest side, at least one pixel each."""
    scale = min(1.0, longest / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def encoded(rgb: npt.NDArray[np.uint8]) -> StoredImage:
    """How every image is stored that is not kept byte for byte: JPEG, quality 90.

    Args:
        rgb: ``[height, width, 3]``, upright.
    """
    data = simplejpeg.encode_jpeg(rgb, quality=_QUALITY, colorsubsampling="420")
    return StoredImage(data, "jpg", rgb.shape[1], rgb.shape[0])
