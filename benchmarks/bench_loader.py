"""The data pipeline in parts and as a whole, compared with webdataset and open_clip's own loader.

Tar reading and decoding are timed in CPU seconds of one thread, the loaders in wall seconds with two worker processes.
The images are crops of scikit-learn's two photographs with noise as fine texture, the same in every run. Tars are read
from the page cache with their stored index, as in every epoch except a run's first, which has a row of its own.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import main, spread
from mc2_hpc.config import DataConfig
from mc2_hpc.conversion.peers import import_open_clip
from mc2_hpc.conversion.tokenizer_files import write_tokenizer
from mc2_hpc.data.crop import Box, dct_scaled, random_crop
from mc2_hpc.data.decode import TrainTransform, crop_and_resize
from mc2_hpc.data.loader import TrainLoader
from mc2_hpc.data.packing import write_shard
from mc2_hpc.data.shards import open_shard
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.draws import hash_keys
from mc2_hpc.quickstart.captions import LANGUAGES, draw_caption, number_names

SIZES = {"640x480": (640, 480), "1024x768": (1024, 768)}
TAR_SIZES = {"256 px": (341, 256), "640x480": (640, 480)}
"""img2dataset's default size, and a common original size."""
CROP_SCALE = (0.9, 1.0)
IMAGE_SIZE = 224
BATCH = 64
WORKERS = 2
CONTEXT = 77


def run(quick: bool) -> dict[str, Any]:
    """All parts in sequence; the loaders come last, because they need both cores."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="webdataset")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        tars = _bench_tar(folder, samples=300 if quick else 1000, shards=2 if quick else 6, rounds=2 if quick else 7)
        decoding = _bench_decode(number=24 if quick else 250, rounds=1 if quick else 5)
        loaders = _bench_loader(folder, batches=4 if quick else 40, rounds=1 if quick else 5)
        memory = _bench_memory(folder, samples=4_000 if quick else 100_000)
    return {
        "config": {
            "image_size": IMAGE_SIZE,
            "crop_scale": CROP_SCALE,
            "loader": {"batch": BATCH, "workers": WORKERS, "images": " and ".join(SIZES)},
            "jpeg_quality": 90,
        },
        "rows": [*tars, *decoding, *loaders, memory],
        "ratios": {
            "tar_vs_webdataset": _ratio(tars, "ours", "webdataset", "256 px"),
            "decode_fast_vs_open_clip": min(_ratio(decoding, "turbo", "open_clip", size) for size in SIZES),
            "decode_exact_vs_open_clip": min(_ratio(decoding, "turbo_exact", "open_clip", size) for size in SIZES),
            "loader_vs_open_clip": _ratio(loaders, "ours", "open_clip", "mixed"),
        },
    }


def _ratio(rows: list[dict[str, Any]], ours: str, peer: str, size: str) -> float:
    """Median over the rounds of the ratio of ours to the peer's."""
    found = {row["who"]: row["samples"] for row in rows if row["images"] == size}
    return statistics.median(a / b for a, b in zip(found[ours], found[peer], strict=True))


def _rates(
    contenders: Mapping[str, Callable[[], int]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Samples per second of each contender, which returns its number of samples; alternating, after a warm-up round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, call in contenders.items():
            start = clock()
            made = call()
            seconds = clock() - start
            if number:
                rates[name].append(made / seconds)
    return rates


# Tars


def _bench_tar(folder: Path, *, samples: int, shards: int, rounds: int) -> list[dict[str, Any]]:
    """Key, image and caption of every sample in shards with ``jpg``, ``json`` and ``txt``."""
    import webdataset

    rows = []
    for label, size in TAR_SIZES.items():
        images = _images(*size, number=60)
        paths = [folder / f"tar {label}" / f"{number:05d}.tar" for number in range(shards)]
        for number, path in enumerate(paths):
            write_shard(path, (_img2dataset_sample(number * samples + i, images[i % 60]) for i in range(samples)))
            os.utime(path, (0, 0))  # an old shard, so that its index is stored

        def read_ours(paths: list[Path] = paths) -> int:
            opened = (open_shard(path) for path in paths)
            return sum(
                len(shard.read(row, seed=0, epoch=0).key) > 0 for shard in opened for row in range(shard.num_keys)
            )

        def first_sight(paths: list[Path] = paths) -> int:
            for path in paths:
                path.with_name(f".{path.name}.index").unlink()
            return read_ours(paths)

        def read_webdataset(paths: list[Path] = paths) -> int:
            return sum(1 for _ in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))

        _check_same_samples(paths)
        contenders = {"ours": read_ours, "webdataset": read_webdataset, "ours, first sight": first_sight}
        mean_kb = statistics.mean(map(len, images)) / 1e3
        for who, found in _rates(contenders, rounds, time.process_time).items():
            rows.append(_row("tar", who, label, "samples / CPU-s", found, jpeg_kb=mean_kb))
    return rows


def _check_same_samples(paths: list[Path]) -> None:
    """Check that both readers return the same keys, images and captions; this also builds our indexes."""
    import webdataset

    theirs = iter(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    for shard in map(open_shard, paths):
        for row in range(shard.num_keys):
            key, image, text, _ = shard.read(row, seed=0, epoch=0)
            sample = next(theirs)
            assert (key, image, text) == (sample["__key__"], sample["jpg"], sample["txt"].decode()), key
    assert next(theirs, None) is None


def _img2dataset_sample(number: int, image: bytes) -> tuple[str, dict[str, bytes]]:
    key = f"{number:09d}"
    described = {
        "url": f"https://example.org/{key}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 341,
        "height": 256,
        "original_width": 1024,
        "original_height": 768,
        "exif": "{}",
        "sha256": "0" * 64,
    }
    caption = f"a photograph of something, number {number} of many"
    return key, {"jpg": image, "json": json.dumps(described).encode(), "txt": caption.encode()}


# Decoding


def _bench_decode(*, number: int, rounds: int) -> list[dict[str, Any]]:
    """JPEG to RandomResizedCrop: open_clip's transform returns normalised floats, ours bytes (the GPU normalises)."""
    open_clip = import_open_clip()
    theirs = open_clip.image_transform(IMAGE_SIZE, is_train=True, aug_cfg=open_clip.AugmentationCfg(scale=CROP_SCALE))
    rows = []
    for label, size in SIZES.items():
        images = _images(*size, number=number)
        keys = hash_keys([str(i) for i in range(number)])

        def decode(backend: str, images: list[bytes] = images, keys: Any = keys) -> int:
            transform = TrainTransform(IMAGE_SIZE, CROP_SCALE, 0, backend)
            for data, key in zip(images, keys, strict=True):
                transform(data, key, 0)
            return len(images)

        def decode_theirs(images: list[bytes] = images) -> int:
            for data in images:
                theirs(Image.open(io.BytesIO(data)))
            return len(images)

        contenders = {
            "open_clip": decode_theirs,
            "turbo": lambda decode=decode: decode("turbo"),
            "turbo_exact": lambda decode=decode: decode("turbo_exact"),
        }
        mean_kb = statistics.mean(map(len, images)) / 1e3
        for who, found in _rates(contenders, rounds, time.process_time).items():
            quality = {} if who == "open_clip" else {"psnr_db": _likeness(images, keys, who)}
            rows.append(_row("decode", who, label, "images / CPU-s", found, jpeg_kb=mean_kb, **quality))
    return rows


def _likeness(images: list[bytes], keys: Any, backend: str) -> dict[str, float]:
    """PSNR to Pillow's image of the same box, which equals open_clip's bit for bit (tests/data/test_decode.py)."""
    found = []
    for data, key in zip(images, keys, strict=True):

        def choose(height: int, width: int, key: np.uint64 = key) -> Box:
            box = random_crop(height, width, key_hash=key, seed=0, epoch=0, scale=CROP_SCALE)
            return dct_scaled(box, IMAGE_SIZE)[1] if backend == "turbo" else box

        ours = crop_and_resize(data, choose, IMAGE_SIZE, backend)
        reference = crop_and_resize(data, choose, IMAGE_SIZE, "pil")
        found.append(10 * math.log10(255**2 / float((ours.double() - reference.double()).square().mean())))
    return spread(found)


# Loaders


def _bench_loader(folder: Path, *, batches: int, rounds: int) -> list[dict[str, Any]]:
    """Tars to batches of images and token ids, with worker processes; each round starts a new loader."""
    rng = np.random.default_rng(1)
    names = number_names()
    texts = [draw_caption(lang, name, rng) for lang in LANGUAGES for name in names[lang]]
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", vocab_size=1000, style="xlmv")
    images = [image for size in SIZES.values() for image in _images(*size, number=60)]
    for number in range(8):
        samples = (_img2dataset_sample(number * 256 + i, images[(i * 7 + number) % 120]) for i in range(256))
        write_shard(folder / "loader" / f"{number:05d}.tar", samples)
        os.utime(folder / "loader" / f"{number:05d}.tar", (0, 0))
    (folder / "hf").mkdir()
    write_tokenizer(folder / "tokenizer.model", "xlmv", CONTEXT, folder / "hf")
    contenders = {
        "ours": lambda: _loader_rate(_ours(folder, tokenizer), batches),
        "open_clip": lambda: _loader_rate(_open_clip(folder), batches),
    }
    rates: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(rounds):
        for who, measure in contenders.items():
            rates[who].append(measure())
    return [_row("loader", who, "mixed", "samples / s", found) for who, found in rates.items()]


def _loader_rate(loader: Iterator[int], batches: int) -> float:
    """Samples per second, after skipping the batches that may have been prefetched."""
    for _ in range(3 * WORKERS):
        next(loader)
    start = time.perf_counter()
    made = sum(next(loader) for _ in range(batches))
    rate = made / (time.perf_counter() - start)
    loader.close()  # type: ignore[attr-defined]
    return rate


def _ours(folder: Path, tokenizer: Tokenizer) -> Iterator[int]:
    config = DataConfig(train=str(folder / "loader"), lanes=BATCH, workers=WORKERS, crop_scale=CROP_SCALE)
    loader = TrainLoader(config, global_batch=BATCH, image_size=IMAGE_SIZE, tokenizer=tokenizer, rank=0, world_size=1)
    try:
        for batch in loader:
            yield len(batch.images)
    finally:
        loader.close()


def _open_clip(folder: Path) -> Iterator[int]:
    open_clip = import_open_clip()
    from open_clip_train.data import get_wds_dataset

    transform = open_clip.image_transform(
        IMAGE_SIZE, is_train=True, aug_cfg=open_clip.AugmentationCfg(scale=CROP_SCALE)
    )
    arguments = argparse.Namespace(
        train_data=f"{folder}/loader/{{00000..00007}}.tar",
        train_num_samples=10_000_000,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=BATCH,
        workers=WORKERS,
        world_size=1,
    )
    tokenizer = open_clip.tokenizer.HFTokenizer(str(folder / "hf"), context_length=CONTEXT)
    data = get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
    for images, _ in data.dataloader:
        yield len(images)


# Memory


def _bench_memory(folder: Path, *, samples: int) -> dict[str, Any]:
    """Proportional memory of the loader's processes over many samples of small images."""
    images = _images(96, 72, number=60)
    for number in range(10):
        files = (_img2dataset_sample(number * 500 + i, images[i % 60]) for i in range(500))
        write_shard(folder / "memory" / f"{number:05d}.tar", files)
    config = DataConfig(train=str(folder / "memory"), lanes=BATCH, workers=WORKERS)
    tokenizer = Tokenizer(folder / "tokenizer.model", "xlmv", context_length=CONTEXT)
    loader = TrainLoader(config, global_batch=BATCH, image_size=64, tokenizer=tokenizer, rank=0, world_size=1)
    seen, at, megabytes = 0, [], []
    step = samples // 10
    for batch in loader:
        seen += len(batch.images)
        if seen >= step * (len(at) + 1):
            at.append(seen)
            megabytes.append(_memory_mb())
        if seen >= samples:
            break
    loader.close()
    return {
        "part": "memory",
        "who": "ours",
        "images": "96x72",
        "unit": "MB of this process and its workers",
        "at_samples": at,
        "samples": megabytes,
        "growth_mb": megabytes[-1] - megabytes[1],
        **spread(megabytes),
    }


def _memory_mb() -> float:
    """Resident megabytes of this process and its children; shared pages are divided among those processes."""
    total = 0
    for pid in ["self", *(str(child.pid) for child in multiprocessing.active_children())]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1e3


# Images


def _images(width: int, height: int, number: int) -> list[bytes]:
    """JPEGs of random crops of the two photographs, with some noise."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(width)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    made = []
    for i in range(number):
        photo = photos[i % len(photos)]
        part_width = int(rng.integers(320, 560))
        part_height = part_width * height // width
        x = int(rng.integers(0, photo.width - part_width))
        y = int(rng.integers(0, photo.height - part_height))
        part = photo.crop((x, y, x + part_width, y + part_height)).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(part, np.float32) + rng.normal(scale=2, size=(height, width, 1))
        data = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        made.append(data.getvalue())
    return made


def _row(part: str, who: str, images: str, unit: str, found: list[float], **more: Any) -> dict[str, Any]:
    return {"part": part, "who": who, "images": images, "unit": unit, **spread(found), "samples": found, **more}


if __name__ == "__main__":
    main("loader", run)
