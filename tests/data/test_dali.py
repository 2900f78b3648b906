"""DALI's pipeline on the CPU: the same crops as other backends, one bad JPEG costs one sample, order and resume."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mc2_hpc.config import DataConfig
from mc2_hpc.data.crop import Box, EncodedCrop, random_crop
from mc2_hpc.data.dali import IN_FLIGHT, DaliDecoder, Jpegs
from mc2_hpc.data.decode import TrainTransform, crop_and_resize, resolve_backend
from mc2_hpc.data.loader import Batch, TrainLoader
from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.data.shards import Pair, open_shard
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.draws import hash_keys
from mc2_hpc.drops import Dropped
from mc2_hpc.errors import UserError

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

SIZE = 64
KEYS = hash_keys([str(i) for i in range(100)])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = float((a.double() - b.double()).square().mean())
    return 10 * np.log10(255**2 / max(error, 1e-9))


def decoder(size: int = SIZE, device: str = "cpu", max_batch: int = 40) -> DaliDecoder:
    return DaliDecoder(
        image_size=size, max_batch=max_batch, device=torch.device(device), num_threads=1, hw_decoder_load=0.65
    )


def submit(dali: DaliDecoder, crops: list[EncodedCrop | torch.Tensor], size: int = SIZE) -> None:
    ready = [crop for crop in crops if isinstance(crop, torch.Tensor)]
    jpegs = Jpegs.pack({i: crop for i, crop in enumerate(crops) if isinstance(crop, EncodedCrop)})
    images = torch.stack(ready) if ready else torch.empty((0, 3, size, size), dtype=torch.uint8)
    dali.submit(len(crops), images, [(0, jpegs)])


def decode(crops: list[EncodedCrop | torch.Tensor], size: int = SIZE) -> tuple[torch.Tensor, Counter[str]]:
    dali = decoder(size)
    submit(dali, crops, size)
    for _ in range(IN_FLIGHT - 1):
        submit(dali, crops[:1], size)
    return dali.receive()


@pytest.fixture(scope="module")
def jpegs(make_jpeg: Callable[..., bytes]) -> list[bytes]:
    """Colour, grey, progressive and without chroma subsampling; odd and even sides, one smaller than the target."""
    return [
        make_jpeg(480, 640, 0),
        make_jpeg(333, 501, 1),
        make_jpeg(200, 150, 2, mode="L"),
        make_jpeg(301, 200, 3, progressive=True),
        make_jpeg(120, 90, 4, subsampling=0),
        make_jpeg(40, 50, 5),
    ]


@pytest.mark.parametrize("size", [224, 64])
def test_images_are_the_references(size: int, jpegs: list[bytes]) -> None:
    transform = TrainTransform(size, (0.5, 1.0), 0, "dali")
    crops = [transform(data, key, 0) for data, key in zip(jpegs, KEYS, strict=False)]
    assert all(isinstance(crop, EncodedCrop) for crop in crops)
    images, skipped = decode(crops, size)
    assert images.shape == (len(jpegs), 3, size, size) and images.dtype == torch.uint8 and not skipped
    quality = []
    for data, key, image in zip(jpegs, KEYS, images, strict=False):
        exact = TrainTransform(size, (0.5, 1.0), 0, "turbo_exact")(data, key, 0)
        quality.append(psnr(image, exact))
    print(f"size {size}: PSNR {', '.join(f'{q:.1f}' for q in quality)} dB")
    assert min(quality) >= 50


def test_images_are_the_references_on_real_data(shared_data: Path) -> None:
    shard = open_shard(shared_data / "cc12m-32.tar")
    data = [shard.read(row, seed=0, epoch=0).image for row in range(shard.num_keys)]
    make = {b: TrainTransform(224, (0.9, 1.0), 0, b) for b in ("dali", "pil")}
    images, _ = decode([make["dali"](d, key, 0) for d, key in zip(data, KEYS, strict=False)], 224)
    quality = [psnr(image, make["pil"](d, key, 0)) for image, d, key in zip(images, data, KEYS, strict=False)]
    print(f"median PSNR {np.median(quality):.1f} dB, least {min(quality):.1f} dB")
    assert min(quality) >= 50


def test_boxes_are_those_of_every_backend(jpegs: list[bytes]) -> None:
    crop = TrainTransform(SIZE, (0.5, 1.0), 3, "dali")(jpegs[1], KEYS[7], 2)
    assert isinstance(crop, EncodedCrop) and crop.data == jpegs[1]
    assert crop.box == random_crop(333, 501, key_hash=KEYS[7], seed=3, epoch=2, scale=(0.5, 1.0))


def test_what_is_no_sound_jpeg_never_reaches_the_pipeline(jpegs: list[bytes], make_jpeg: Callable[..., bytes]) -> None:
    transform = TrainTransform(SIZE, (0.9, 1.0), 0, "dali")
    for data in (jpegs[0][:5000], b"nothing", b"\xff\xd8\xff\xd9", jpegs[0][:30]):
        with pytest.raises(Dropped):
            transform(data, KEYS[0], 0)
    for data in (make_jpeg(80, 90, mode="CMYK"), jpegs[0] + b"trailing"):
        assert isinstance(transform(data, KEYS[0], 0), torch.Tensor)


def test_broken_jpegs_cost_themselves_alone(jpegs: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    whole = Box(0, 0, 100, 80)
    good = [EncodedCrop(data, Box(0, 0, 100, 80)) for data in jpegs[:3]]
    headless = EncodedCrop(jpegs[0][:20] + b"\xff\xd9", whole)  # no decoder can read it
    dali = decoder()
    first_pipeline = dali._pipeline
    batches = [good, [good[0], headless, good[2]], good[:2], good, [headless], good]
    results = []
    for batch in batches:
        submit(dali, batch)
        if len(dali._jobs) == IN_FLIGHT:
            results.append(dali.receive())
    for _ in range(IN_FLIGHT - 1):
        submit(dali, good[:1])
        results.append(dali.receive())
    assert dali._pipeline is not first_pipeline  # a failed DALI pipeline is no longer valid
    # A batch in flight together with a bad one may also be decoded on the CPU; after that, DALI decodes again.
    assert 2 <= caplog.text.count("DALI failed on a batch, which is decoded on the CPU") <= 4 < len(results)
    for batch, (images, skipped) in zip(batches, results, strict=False):
        bad = [i for i, crop in enumerate(batch) if crop is headless]
        assert sum(skipped.values()) == len(bad)
        for i, (crop, image) in enumerate(zip(batch, images, strict=True)):
            if i in bad:
                assert (image == 128).all()
            else:
                exact = crop_and_resize(crop.data, lambda h, w: whole, SIZE, "turbo_exact")
                assert psnr(image, exact) > 40


def test_ready_images_keep_their_places(jpegs: list[bytes]) -> None:
    crop = EncodedCrop(jpegs[0], Box(0, 0, 300, 300))
    ready = [torch.full((3, SIZE, SIZE), value, dtype=torch.uint8) for value in (1, 2)]
    images, _ = decode([ready[0], crop, ready[1], crop])
    assert (images[0] == 1).all() and (images[2] == 2).all() and torch.equal(images[1], images[3])
    only_ready, _ = decode([*ready])
    assert only_ready.shape == (2, 3, SIZE, SIZE) and (only_ready[1] == 2).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_same_batches_and_resumes(
    workers: int, make_jpeg: Callable[..., bytes], tokenizer_file: Path, tmp_path: Path
) -> None:
    pairs = [Pair(f"{i:04d}", make_jpeg(70 + i % 9, 80, seed=i), f"image {i}", "en") for i in range(40)]
    pairs[5] = pairs[5]._replace(image=pairs[5].image[:600])
    pairs[9] = pairs[9]._replace(image=pairs[9].image + b"tail")
    pack_pairs(pairs, tmp_path / "shards", pairs_per_shard=10)
    tokenizer = Tokenizer(tokenizer_file, "xlmv")

    def take(backend: str, steps: int, position: object = None) -> list[Batch]:
        loader = TrainLoader(
            DataConfig(train=str(tmp_path / "shards"), lanes=4, workers=workers, decode=backend),
            global_batch=8,
            image_size=SIZE,
            tokenizer=tokenizer,
            rank=0,
            world_size=1,
            position=position,  # type: ignore[arg-type]
        )
        try:
            return [next(loader) for _ in range(steps)]
        finally:
            loader.close()

    expected, found = take("turbo_exact", 8), take("dali", 8)
    found[4:] = take("dali", 4, position=found[3].position)  # batches in flight must not count
    for a, b in zip(expected, found, strict=True):
        assert (a.keys, a.langs, a.position, a.skipped) == (b.keys, b.langs, b.position, b.skipped)
        assert torch.equal(a.tokens, b.tokens)
        assert min(psnr(x, y) for x, y in zip(a.images, b.images, strict=True)) > 40
    assert sum((Counter(batch.skipped) for batch in found), Counter()).keys() == {"image_truncated"}


def test_dali_is_for_training() -> None:
    assert resolve_backend("dali", "train") == "dali"
    with pytest.raises(UserError, match="'dali' cannot be used for eval"):
        resolve_backend("dali", "eval")


@pytest.mark.gpu
def test_the_gpu_decodes_as_the_cpu_does(jpegs: list[bytes]) -> None:
    dali = decoder(device="cuda:0")
    crops = [EncodedCrop(data, Box(0, 0, 40, 50)) for data in jpegs]
    for _ in range(IN_FLIGHT + 3):
        submit(dali, crops)
        if len(dali._jobs) == IN_FLIGHT:
            images, skipped = dali.receive()
            assert images.device.type == "cuda" and not skipped
            for crop, image in zip(crops, images.cpu(), strict=True):
                exact = crop_and_resize(crop.data, lambda h, w: Box(0, 0, 40, 50), SIZE, "turbo_exact")
                assert psnr(image, exact) > 35  # chroma is upsampled differently
