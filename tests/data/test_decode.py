"""Images to tensors: equal to open_clip's transform, close to it when fast, and robust to bad bytes."""

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mc2_hpc.data.crop import Box, dct_scaled, random_crop
from mc2_hpc.data.decode import (
    CPU_BACKENDS,
    MAX_PIXELS,
    EvalTransform,
    TrainTransform,
    crop_and_resize,
    resolve_backend,
)
from mc2_hpc.data.normalise import normalise
from mc2_hpc.data.shards import open_shard
from mc2_hpc.draws import hash_keys
from mc2_hpc.drops import Dropped
from mc2_hpc.errors import UserError

SIDES = st.integers(1, 3000)
KEYS = hash_keys([str(i) for i in range(2000)])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = float((a.double() - b.double()).square().mean())
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.fixture(scope="module")
def images(make_jpeg: Callable[..., bytes]) -> list[bytes]:
    sizes = [(480, 640), (768, 1024), (500, 333), (301, 607)]
    return [make_jpeg(h, w, seed) for seed, (h, w) in enumerate(sizes)]


def test_dali_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match=r"DALI is not installed: pip install 'mc2_hpc\[dali\]'"):
        resolve_backend("dali", "train")


# Crop boxes


@given(SIDES, SIDES, st.sampled_from(KEYS.tolist()), st.integers(0, 5))
def test_crop_lies_inside_and_has_the_asked_area(height: int, width: int, key: int, epoch: int) -> None:
    box = random_crop(height, width, key_hash=np.uint64(key), seed=3, epoch=epoch, scale=(0.9, 1.0))
    assert 0 <= box.top and 0 <= box.left and box.top + box.height <= height and box.left + box.width <= width
    assert box.height >= 1 and box.width >= 1
    if min(height, width) >= 100:
        ratio = box.width / box.height
        assert 0.98 * 3 / 4 <= ratio <= 1.02 * 4 / 3


def test_crop_is_distributed_as_torchvisions(open_clip: ModuleType) -> None:
    from torchvision.transforms import RandomResizedCrop  # importable if open_clip is

    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    theirs = [RandomResizedCrop.get_params(image, (0.3, 1.0), (3 / 4, 4 / 3)) for _ in KEYS]
    ours = [random_crop(300, 400, key_hash=key, seed=0, epoch=0, scale=(0.3, 1.0)) for key in KEYS]
    for a, b in zip(np.array(ours, float).T, np.array(theirs, float).T, strict=True):
        noise = np.hypot(a.std(), b.std()) / np.sqrt(len(a))
        assert abs(a.mean() - b.mean()) < 4 * noise
        assert abs(a.std() - b.std()) < 4 * noise


def test_crop_differs_by_epoch_and_key_and_nothing_else() -> None:
    def draw(key: int = 0, epoch: int = 0, seed: int = 0) -> Box:
        return random_crop(300, 400, key_hash=KEYS[key], seed=seed, epoch=epoch, scale=(0.5, 1.0))

    assert draw() == draw()
    assert len({draw(), draw(key=1), draw(epoch=1), draw(seed=1)}) == 4


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([64, 224]))
def test_dct_scale_keeps_the_target_size_and_stays_in_the_box(
    top: int, left: int, height: int, width: int, size: int
) -> None:
    box = Box(top, left, height, width)
    eighths, snapped = dct_scaled(box, size)
    if eighths == 8:
        assert snapped == box
        assert min(height, width) // 2 * 2 < 2 * size  # half would have been too small
        return
    assert all(side * eighths % 8 == 0 for side in snapped)
    assert min(snapped.height, snapped.width) * eighths // 8 >= size
    assert all(0 <= was - now <= 7 for was, now in zip(box, snapped, strict=True))


# Fidelity


@pytest.mark.parametrize("size", [64, 224])
def test_pil_backend_is_open_clips_train_transform(
    open_clip: ModuleType, images: list[bytes], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.transforms import RandomResizedCrop

    box = Box(11, 7, 280, 301)
    monkeypatch.setattr(RandomResizedCrop, "get_params", staticmethod(lambda *_: tuple(box)))
    theirs = open_clip.image_transform(size, is_train=True)
    for data in images:
        ours = crop_and_resize(data, lambda h, w: box, size, "pil")
        assert torch.equal(normalise(ours[None])[0], theirs(Image.open(io.BytesIO(data))))


def snapped_reference(data: bytes, key: np.uint64, size: int, backend: str) -> torch.Tensor:
    """Pillow's image of the box that ``backend`` actually used."""

    def choose(height: int, width: int) -> Box:
        box = random_crop(height, width, key_hash=key, seed=0, epoch=0, scale=(0.9, 1.0))
        return dct_scaled(box, size)[1] if backend == "turbo" else box

    return crop_and_resize(data, choose, size, "pil")


@pytest.mark.parametrize(("backend", "median", "least"), [("turbo", 40, 33), ("turbo_exact", 60, 50)])
@pytest.mark.parametrize("size", [32, 224])
def test_fast_backends_are_close_to_pil(
    backend: str, median: float, least: float, size: int, images: list[bytes]
) -> None:
    transform = TrainTransform(size, (0.9, 1.0), seed=0, backend=backend)
    quality = [
        psnr(transform(data, key, 0), snapped_reference(data, key, size, backend))
        for key, data in zip(KEYS, images * 3, strict=False)
    ]
    assert np.median(quality) >= median and min(quality) >= least


@pytest.mark.parametrize(("backend", "median", "least"), [("turbo", 40, 30), ("turbo_exact", 60, 50)])
def test_fast_backends_are_close_to_pil_on_real_images(
    backend: str, median: float, least: float, shared_data: Path
) -> None:
    shard = open_shard(shared_data / "cc12m-32.tar")
    transform = TrainTransform(224, (0.9, 1.0), seed=0, backend=backend)
    quality = []
    for row, key in enumerate(shard.row_hashes()):
        data = shard.read(row, seed=0, epoch=0).image
        quality.append(psnr(transform(data, key, 0), snapped_reference(data, key, 224, backend)))
    print(f"{backend}: median PSNR {np.median(quality):.1f} dB, least {min(quality):.1f} dB")
    assert len(quality) == 32 and np.median(quality) >= median and min(quality) >= least


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_eval_transform_is_open_clips(mode: str, open_clip: ModuleType, images: list[bytes]) -> None:
    theirs = open_clip.image_transform(224, is_train=False, resize_mode=mode)
    quality = []
    for data in images:
        expected = theirs(Image.open(io.BytesIO(data)))
        exact = EvalTransform(224, mode, "pil")(data)
        assert torch.equal(normalise(exact[None])[0], expected)
        quality.append(psnr(EvalTransform(224, mode)(data), exact))
    assert np.median(quality) >= 60 and min(quality) >= 50


def test_small_images_are_enlarged(make_jpeg: Callable[..., bytes]) -> None:
    data = make_jpeg(32, 32, 5)
    images = {b: TrainTransform(64, (0.9, 1.0), 0, b)(data, KEYS[0], 0) for b in CPU_BACKENDS}
    assert all(p.shape == (3, 64, 64) and p.dtype == torch.uint8 for p in images.values())
    assert psnr(images["turbo"], images["pil"]) > 50


# Other formats, and bad bytes


def encoded(image: Image.Image, kind: str, **save: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **save)
    return out.getvalue()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP")]
    + [("RGBA", "WEBP"), ("P", "GIF"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "BMP")],
)
def test_every_format_becomes_rgb(mode: str, kind: str, backend: str) -> None:
    image = Image.new("RGB", (90, 80), (200, 100, 50))
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    out = TrainTransform(32, (0.9, 1.0), 0, backend)(encoded(image, kind), KEYS[0], 0)
    assert out.shape == (3, 32, 32) and out.dtype == torch.uint8
    if mode in ("RGB", "RGBA", "CMYK"):
        assert (out.float().mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 8


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(Dropped) as caught:
        call()
    return caught.value.reason


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bad_bytes_have_a_reason(backend: str, make_jpeg: Callable[..., bytes]) -> None:
    good = make_jpeg(80, 90)
    transform = TrainTransform(32, (0.9, 1.0), 0, backend)
    for cut in (2, 100, len(good) // 2, len(good) - 2):
        assert reason(lambda cut=cut: transform(good[:cut], KEYS[0], 0)) in ("image_truncated", "image_undecodable")
    assert reason(lambda: transform(good[: len(good) // 2], KEYS[0], 0)) == "image_truncated"
    png = encoded(Image.new("RGB", (64, 64)), "PNG")
    for data in (b"", b"not an image", bytes(1000), png[:60], b"<svg/>"):
        assert reason(lambda data=data: transform(data, KEYS[0], 0)) == "image_undecodable"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_damage_that_pillow_forgives_is_no_reason_to_skip(backend: str, make_jpeg: Callable[..., bytes]) -> None:
    data = bytearray(make_jpeg(200, 200, 3))
    data[len(data) // 2 : len(data) // 2 + 30] = bytes(30)
    out = TrainTransform(32, (0.9, 1.0), 0, backend)(bytes(data), KEYS[0], 0)
    assert out.shape == (3, 32, 32)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_decompression_bombs_are_not_decoded(backend: str, make_jpeg: Callable[..., bytes]) -> None:
    transform = TrainTransform(32, (0.9, 1.0), 0, backend)
    for width in (MAX_PIXELS // 8192 + 1, 60_000):
        assert reason(lambda width=width: transform(png_header(width, 8192), KEYS[0], 0)) == "image_too_large"
    jpeg = bytearray(make_jpeg(80, 90))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", 30_000, 30_000)
    assert reason(lambda: transform(bytes(jpeg), KEYS[0], 0)) == "image_too_large"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_very_large_jpeg_is_read_at_a_smaller_scale(backend: str, make_jpeg: Callable[..., bytes]) -> None:
    data = make_jpeg(400, 300)
    whole, reduced, refused = (
        TrainTransform(32, (0.9, 1.0), 0, backend, max_pixels) for max_pixels in (400 * 300, 200 * 150, 400 * 300 // 9)
    )
    difference = reduced(data, KEYS[0], 0).float() - whole(data, KEYS[0], 0).float()
    assert difference.abs().mean() < 8
    assert reason(lambda: refused(data, KEYS[0], 0)) == "image_too_large"


@pytest.mark.parametrize("backend", ["pil", "turbo_exact"])
def test_a_thread_of_a_image_does_not_explode_in_evaluation(backend: str) -> None:
    data = encoded(Image.new("RGB", (1, 8000)), "PNG")
    assert reason(lambda: EvalTransform(224, "shortest", backend)(data)) == "image_too_large"
    assert EvalTransform(224, "squash", backend)(data).shape == (3, 224, 224)
    assert TrainTransform(32, (0.9, 1.0), 0, "turbo")(data, KEYS[0], 0).shape == (3, 32, 32)


def test_backends_are_explicit() -> None:
    assert resolve_backend("auto", "train") == "turbo" and resolve_backend("auto", "eval") == "turbo_exact"
    with pytest.raises(UserError, match="'turbo' cannot be used for eval: choose one of auto, turbo_exact, pil"):
        resolve_backend("turbo", "eval")
    with pytest.raises(UserError, match="choose shortest or squash"):
        EvalTransform(224, "longest")
