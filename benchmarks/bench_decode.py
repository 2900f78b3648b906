"""JPEGs to RandomResizedCrops on the training device: DALI, torchvision's nvJPEG, and the CPU's cores.

    python -m benchmarks.bench_decode [--quick] [--json FILE]

It answers, for a GPU machine, how many images per second can be fed to one GPU, and how much CPU time they cost.
``turbo`` is what data workers run, with one process per core. ``dali`` is the ``mixed`` pipeline of
``data.decode=dali``, by share for the JPEG engine. ``torchvision`` decodes a batch with nvJPEG, then crops and resizes
each image. Without a GPU only the first two are timed, DALI with its CPU operators.
"""

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import Pool
from typing import Any

import numpy as np
import simplejpeg
import torch

from benchmarks.harness import Rows, main, spread
from mc2_hpc.data.crop import Box, EncodedCrop, random_crop
from mc2_hpc.data.dali import IN_FLIGHT, DaliDecoder, Jpegs
from mc2_hpc.data.decode import TrainTransform
from mc2_hpc.draws import hash_keys

SIZES = {"640x480": (640, 480), "1024x768": (1024, 768)}
CROP_SCALE = (0.9, 1.0)
IMAGE_SIZE = 224
BATCH = 256
HW_LOADS = (0.0, 0.65, 1.0)

Decode = Callable[[Sequence[bytes], Sequence[Box]], int]


def run(quick: bool) -> dict[str, Any]:
    """Rows of every contender by image size."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cores = len(os.sched_getaffinity(0))
    number, rounds = (32, 1) if quick else (4 * BATCH, 5)
    rows = Rows()
    # Spawned, because forking a process that uses CUDA is unsafe. Timing starts once all have finished importing.
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(cores + 1)
    with context.Pool(cores, _prepare, (ready,)) as pool:
        ready.wait(timeout=120)
        for label, size in SIZES.items():
            jpegs = draw_jpegs(*size, number=number)
            boxes = [_box(size, key) for key in range(number)]
            found = _rates(_contenders(device, cores, pool, number), jpegs, boxes, rounds)
            rows += [{"who": who, "images": label, **figures} for who, figures in found.items()]
    return {
        "config": {
            "jpegs": "1/f clouds, quality 90",
            "image_size": IMAGE_SIZE,
            "crop_scale": CROP_SCALE,
            "batch": BATCH,
            "cores": cores,
        },
        "rows": rows,
        "ratios": {},
    }


def draw_jpegs(width: int, height: int, *, number: int) -> list[bytes]:
    """JPEGs of clouds with the spectrum of photographs, amplitude 1/f; generated with NumPy alone."""
    rng = np.random.default_rng(width)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    jpegs = []
    for _ in range(number):
        phases = rng.uniform(0, 2 * np.pi, (3, *frequency.shape))
        colours = np.fft.irfft2(np.exp(1j * phases) / frequency, s=(height, width))
        # The colour channels of photographs are strongly correlated.
        pixels = 0.8 * colours[:1] + 0.2 * colours
        pixels = 128 + 50 * pixels / pixels.std()
        array = np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        jpegs.append(simplejpeg.encode_jpeg(array, quality=90, colorsubsampling="420"))
    return jpegs


def _prepare(ready: Any) -> None:
    torch.set_num_threads(1)
    ready.wait(timeout=120)


def _box(size: tuple[int, int], number: int) -> Box:
    width, height = size
    return random_crop(height, width, key_hash=hash_keys([str(number)])[0], seed=0, epoch=0, scale=CROP_SCALE)


def _contenders(device: torch.device, cores: int, pool: Pool, number: int) -> dict[str, Decode]:
    contenders: dict[str, Decode] = {"turbo": partial(_turbo, pool, cores)}
    for load in HW_LOADS if device.type == "cuda" else HW_LOADS[:1]:
        decoder = DaliDecoder(
            image_size=IMAGE_SIZE,
            max_batch=min(BATCH, number),
            device=device,
            num_threads=cores,
            hw_decoder_load=load,
        )
        contenders[f"dali {load:g}" if device.type == "cuda" else "dali"] = partial(_dali, decoder)
    if device.type == "cuda":
        contenders["torchvision"] = partial(_torchvision, device)
    return contenders


def _rates(
    contenders: dict[str, Decode], jpegs: Sequence[bytes], boxes: Sequence[Box], rounds: int
) -> dict[str, dict[str, Any]]:
    """Images per second, and CPU seconds of all processes per thousand images; alternating, after a warm-up round."""
    rates: dict[str, list[float]] = {who: [] for who in contenders}
    costs: dict[str, list[float]] = {who: [] for who in contenders}
    for number in range(rounds + 1):
        for who, decode in contenders.items():
            begin, cpu = time.perf_counter(), _cpu_seconds()
            made = decode(jpegs, boxes)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                rates[who].append(made / (time.perf_counter() - begin))
                costs[who].append(1000 * (_cpu_seconds() - cpu) / made)
    return {
        who: {
            "unit": "images / s",
            **spread(rates[who]),
            "samples": rates[who],
            "cpu_seconds_per_thousand": statistics.median(costs[who]),
        }
        for who in contenders
    }


def _cpu_seconds() -> float:
    """CPU seconds of this process and its running children."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ticks = 0
    for child in multiprocessing.active_children():
        with open(f"/proc/{child.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def _batches(jpegs: Sequence[bytes], boxes: Sequence[Box]) -> Iterator[dict[int, EncodedCrop]]:
    for start in range(0, len(jpegs), BATCH):
        pairs = zip(jpegs[start : start + BATCH], boxes[start : start + BATCH], strict=True)
        yield {row: EncodedCrop(jpeg, box) for row, (jpeg, box) in enumerate(pairs)}


def _dali(decoder: DaliDecoder, jpegs: Sequence[bytes], boxes: Sequence[Box]) -> int:
    batches = list(_batches(jpegs, boxes))
    nothing = torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    # Extra batches at the end keep the pipeline full: a batch is received while another is in flight.
    for number, batch in enumerate((*batches, *batches[:1] * (IN_FLIGHT - 1))):
        decoder.submit(len(batch), nothing, [(0, Jpegs.pack(batch))])
        if number >= IN_FLIGHT - 1:
            decoder.receive()
    return len(jpegs)


def _torchvision(device: torch.device, jpegs: Sequence[bytes], boxes: Sequence[Box]) -> int:
    from torchvision.io import decode_jpeg
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resized_crop

    for batch in _batches(jpegs, boxes):
        data = [torch.frombuffer(bytearray(crop.data), dtype=torch.uint8) for crop in batch.values()]
        images = decode_jpeg(data, device=device)
        size = [IMAGE_SIZE, IMAGE_SIZE]
        torch.stack(
            [
                resized_crop(image, *crop.box, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
                for image, crop in zip(images, batch.values(), strict=True)
            ]
        )
    return len(jpegs)


def _turbo(pool: Pool, cores: int, jpegs: Sequence[bytes], boxes: Sequence[Box]) -> int:
    # Workers draw the box from the key, like data workers; they are sent the bytes that those would read.
    return sum(pool.map(_turbo_share, [jpegs[part::cores] for part in range(cores)], chunksize=1))


def _turbo_share(jpegs: Sequence[bytes]) -> int:
    transform = TrainTransform(IMAGE_SIZE, CROP_SCALE, 0, "turbo")
    for number, jpeg in enumerate(jpegs):
        transform(jpeg, hash_keys([str(number)])[0], 0)
    return len(jpegs)


if __name__ == "__main__":
    main("decode", run)
