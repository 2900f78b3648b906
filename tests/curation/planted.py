"""Copies of images as they occur on the web, planted among images that are not copies."""

import io
import tarfile

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from mc2_hpc.images import load_rgb, open_image


def web_images(shared_data):
    """32 encoded photographs from the web, by key."""
    with tarfile.open(shared_data / "cc12m-32.tar") as tar:
        return {member.name[:-4]: tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")}


def small_images(shared_data, count):
    """Encoded photographs of 32x32 pixels, by key."""
    table = pq.read_table(shared_data / "cifar10-train.parquet", columns=["jpg"]).slice(0, count)
    return {f"small-{number:05d}": bytes(data) for number, data in enumerate(table["jpg"].to_pylist())}


def encoded(image, quality=90, form="JPEG"):
    file = io.BytesIO()
    image.save(file, form, quality=quality)
    return file.getvalue()


def cropped(image, rng, most):
    """Up to ``most`` of the size is cut from each edge, independently."""
    width, height = image.size
    left, top, right, bottom = rng.uniform(0, most, 4)
    box = (width * left, height * top, width * (1 - right), height * (1 - bottom))
    return image.crop(tuple(map(round, box)))


def captioned(image, rng, share):
    """A caption over the top or the bottom ``share``: on black, on white, or on the image."""
    image = image.copy()
    width, height = image.size
    draw, line = ImageDraw.Draw(image), max(3, round(height * share))
    top = rng.choice([0, height - line])
    paper, ink = [("black", "white"), ("white", "black"), (None, "white")][rng.integers(3)]
    if paper:
        draw.rectangle((0, top, width, top + line), fill=paper)
    font = ImageFont.load_default(size=max(6, 0.7 * line))
    draw.text((0.05 * width, top + 0.1 * line), "WHEN YOU SEE A COPY OF A COPY", ink, font, stroke_width=line // 20)
    return image


def mirrored(image):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


KINDS = {
    "re-encoded": lambda image, rng: encoded(image, 30),
    "webp": lambda image, rng: encoded(image, 50, "WEBP"),
    "grey": lambda image, rng: encoded(image.convert("L")),
    "half": lambda image, rng: encoded(image.resize((image.width // 2, image.height // 2))),
    "mirrored": lambda image, rng: encoded(mirrored(image)),
    "cropped": lambda image, rng: encoded(cropped(image, rng, 0.05)),
    "captioned": lambda image, rng: encoded(captioned(image, rng, 0.15)),
    "mirrored and cropped": lambda image, rng: encoded(mirrored(cropped(image, rng, 0.05))),
}
"""Ways to copy an image: from its pixels and a random generator to bytes."""


def copies_of(images, seed=0, kinds=KINDS):
    """A copy of each kind of each encoded image: bytes by (key, kind)."""
    rng = np.random.default_rng(seed)
    return {
        (key, kind): make(load_rgb(open_image(data)), rng)
        for key, data in images.items()
        for kind, make in kinds.items()
    }
