"""Decoding many kinds of images to RGB."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from mc2_hpc.config import DataConfig
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.images import MAX_PIXELS, REDUCED, image_size, load_rgb, open_image

GREYS = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
COLOURS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rgb(data, **options):
    return np.asarray(load_rgb(open_image(data), **options))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_high_byte(form):
    found = rgb(encoded(Image.fromarray(GREYS), form))
    assert (found == (GREYS >> 8).astype(np.uint8)[..., None]).all()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats(form):
    assert (rgb(encoded(Image.fromarray(COLOURS), form)) == COLOURS).all()


def test_transparency_of_a_palette_is_dropped_without_a_warning():
    image = Image.fromarray(COLOURS).quantize(16)
    data = encoded(image, "PNG", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rgb(data)
    assert (found == np.asarray(image.convert("RGB"))).all()


def test_the_first_frame_of_an_animation():
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    assert (rgb(encoded(first, "GIF", save_all=True, append_images=[second])) == (255, 0, 0)).all()


def test_orientation_is_applied_on_request():
    image = Image.fromarray(COLOURS)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise for display
    data = encoded(image, "PNG", exif=exif)
    assert (rgb(data) == COLOURS).all()
    assert (rgb(data, upright=True) == np.rot90(COLOURS, -1)).all()


def test_a_large_jpeg_is_read_at_a_smaller_scale():
    data = encoded(Image.new("RGB", (400, 300), "green"), "JPEG")
    assert load_rgb(open_image(data, max_pixels=400 * 300)).size == (400, 300)
    assert load_rgb(open_image(data, max_pixels=200 * 150)).size == (200, 150)
    assert load_rgb(open_image(data, max_pixels=200 * 150 - 1)).size == (100, 75)
    assert image_size(data, max_pixels=200 * 150 - 1) == (400, 300), "as it is stored"
    with pytest.raises(Dropped) as caught:
        image_size(data, max_pixels=400 * 300 // REDUCED - 1)
    assert caught.value.reason is Drop.IMAGE_TOO_LARGE
    with pytest.raises(Dropped) as caught:
        open_image(data, max_pixels=400 * 300 // REDUCED - 1)
    assert caught.value.reason is Drop.IMAGE_TOO_LARGE


def test_a_bomb_is_refused_before_it_is_decoded():
    data = encoded(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(data) < 200_000
    with pytest.raises(Dropped) as caught:
        open_image(data)
    assert caught.value.reason is Drop.IMAGE_TOO_LARGE


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", Drop.IMAGE_UNDECODABLE),
        (b"<html>not found</html>", Drop.IMAGE_UNDECODABLE),
        (encoded(Image.fromarray(COLOURS), "PNG")[:-200], Drop.IMAGE_UNDECODABLE),
        (encoded(Image.fromarray(COLOURS), "JPEG")[:-200], Drop.IMAGE_TRUNCATED),
        (encoded(Image.fromarray(COLOURS[..., 0].astype(np.float32)), "TIFF"), Drop.IMAGE_UNDECODABLE),
    ],
    ids=["empty", "html", "cut png", "cut jpeg", "floating point"],
)
def test_damage_has_a_reason(data, reason):
    with pytest.raises(Dropped) as caught:
        rgb(data)
    assert caught.value.reason is reason


def test_the_limit_is_the_default_of_training():
    assert DataConfig().max_image_pixels == MAX_PIXELS
