"""Evaluation compared with CLIP_benchmark: image features per second, and seconds for a large retrieval.

    mc2 bench eval [--quick] [--json FILE]

Features: both have the same weights, a ViT-B/32 with a small text tower, and read 640x480 JPEG files. Theirs is
open_clip's model and transform in a torch DataLoader, ours is ``Encoder.images``, both in fp32 on all cores. Theirs
runs with one worker per core besides torch's threads, or with none, whichever is faster.

Retrieval: Crossmodal-3600's size, 3,600 images and two captions each in 36 locales, from precomputed features. Ours is
timed on all 36. Theirs, CLIP_benchmark's ``recall_at_k`` over the full matrix, is timed on one locale per round, and
the median counts 36 times; a row says how many locales were timed. Memory is the growth for one locale, in a process
each.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.harness import ROOT, alternate, main, own_command, resident_growth, spread
from mc2_hpc.conversion.convert import convert
from mc2_hpc.conversion.peers import import_open_clip
from mc2_hpc.data.tokenizer import train_tokenizer
from mc2_hpc.distributed import process_group
from mc2_hpc.evaluation.encoder import Encoder
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.retrieval import recall
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, write_card, write_tensors

NUM_IMAGES, NUM_LOCALES, WIDTH = 3_600, 36, 1_024
KS = (1, 5, 10)
BATCH = 64


def run(quick: bool) -> dict[str, Any]:
    """Rows and ratios of both comparisons."""
    with tempfile.TemporaryDirectory() as name:
        features = measure_features(Path(name), images=16 if quick else 128, rounds=1 if quick else 3)
    retrieval = measure_retrieval(images=400 if quick else NUM_IMAGES, rounds=1 if quick else 2)
    rate = {row["who"]: row["median"] for row in features}
    ours, theirs = (row["seconds_for_36_locales"] for row in retrieval)
    return {
        "config": {
            "images": "640x480 JPEG",
            "batch": BATCH,
            "precision": "fp32",
            "width": WIDTH,
            "locales": NUM_LOCALES,
        },
        "rows": features + retrieval,
        "ratios": {
            "features_vs_open_clip": rate["ours"] / max(rate["open_clip"], rate["open_clip_workers"]),
            "retrieval_vs_clip_benchmark": theirs / ours,
        },
    }


def make_checkpoint(folder: Path) -> Path:
    """A ViT-B/32 with random weights, in our format and, beside it, in open_clip format."""
    ours = folder / "ours"
    ours.mkdir()
    tokenizer = train_tokenizer(
        ["a photo of a cat", "ein Hund"] * 3, ours / TOKENIZER_FILE, vocab_size=40, style="xlmv"
    )
    arch = ClipArchitecture(
        embed_dim=512,
        quick_gelu=False,
        vision=VisionArchitecture(image_size=224, patch_size=32, width=768, layers=12, head_width=64, mlp_width=3072),
        text=TextArchitecture(
            vocab_size=tokenizer.vocab_size, context_length=24, eos_id=2, width=64, layers=1, heads=2
        ),
    )
    write_card(ours, ModelCard(arch=arch, tokenizer_style="xlmv"))
    write_tensors(ours / "model.00000-of-00001.safetensors", build_clip(arch, seed=0).state_dict())
    convert(ours, "open_clip", folder / "open_clip")
    return ours


def make_images(folder: Path, count: int) -> list[str]:
    """640x480 JPEGs cut out of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(count):
        photo, width = photos[number % 2], int(rng.integers(320, 560))
        x, y = int(rng.integers(0, photo.width - width)), int(rng.integers(0, photo.height - width * 3 // 4))
        part = photo.crop((x, y, x + width, y + width * 3 // 4)).resize((640, 480), Image.Resampling.BICUBIC)
        part.save(folder / f"{number:05d}.jpg", quality=90)
    return [f"{number:05d}.jpg" for number in range(count)]


class Files(torch.utils.data.Dataset):
    """A data set like CLIP_benchmark's: files, Pillow, the model's transform."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def measure_features(folder: Path, *, images: int, rounds: int) -> list[dict[str, Any]]:
    """Images per second; checks that both give the same features."""
    checkpoint = make_checkpoint(folder)
    names = make_images(folder / "images", images)
    source = ImageFiles(folder / "images", names)
    open_clip = import_open_clip()
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder / 'open_clip'}")
    model.eval()
    files = Files([folder / "images" / name for name in names], transform)

    def theirs(workers: int) -> Tensor:
        loader = torch.utils.data.DataLoader(files, batch_size=BATCH, num_workers=workers)
        with torch.no_grad():
            return torch.cat([F.normalize(model.encode_image(batch), dim=-1) for batch in loader])

    found: dict[str, Tensor] = {}
    with process_group(60) as ranks:
        encoder = Encoder.load(checkpoint, ranks, batch=BATCH)
        contenders = {
            "ours": lambda: found.update(ours=encoder.images(source).features),
            "open_clip": lambda: found.update(theirs=theirs(0)),
            "open_clip_workers": lambda: theirs(os.cpu_count() or 1),
        }
        seconds = alternate(contenders, rounds=rounds)
    closest = float((found["ours"] * found["theirs"]).sum(1).min())
    assert closest > 0.99, f"the two see different images: cosine {closest}"
    rows = []
    for who, samples in seconds.items():
        rates = [images / sample for sample in samples]
        rows.append({"what": "features", "who": who, "unit": "images/s", **spread(rates), "samples": rates})
    rows[0]["smallest_cosine_to_open_clip"] = closest
    return rows


def measure_retrieval(*, images: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds for R@1, 5, 10 in both directions, alternating, and memory growth; checks that the recalls are equal."""
    seconds: dict[str, list[float]] = {"ours": [], "clip_benchmark": []}

    def timed(who: str, locale: int) -> dict[str, float]:
        features = pairs(images, seed=locale)
        start = time.perf_counter()
        found = RECALL[who](*features)
        seconds[who].append(time.perf_counter() - start)
        return found

    for locale in range(NUM_LOCALES):
        ours = timed("ours", locale)
        if locale % (NUM_LOCALES // rounds) == 0:
            theirs = timed("clip_benchmark", locale)
            assert all(abs(ours[key] - theirs[key]) < 1e-6 for key in ours), (ours, theirs)
    return [
        {
            "what": "retrieval",
            "who": who,
            "unit": "s per locale",
            **spread(samples),
            "seconds_for_36_locales": sum(samples) if who == "ours" else NUM_LOCALES * median(samples),
            "locales_timed": len(samples),
            "memory_mb": peak_memory(who, images) / 2**20,
            "samples": samples,
        }
        for who, samples in seconds.items()
    ]


def pairs(images: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Loosely matching features of images and of two captions each, and each caption's image."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(images, WIDTH, generator=generator), dim=1)
    owners = torch.arange(2 * images) // 2
    texts = F.normalize(image[owners] + 0.25 * torch.randn(2 * images, WIDTH, generator=generator), dim=1)
    return image, texts, owners


def our_recall(image: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
    found = recall(image, texts, owners, KS)
    return {
        **{f"image_retrieval_recall@{k}": found.text_to_image[k] for k in KS},
        **{f"text_retrieval_recall@{k}": found.image_to_text[k] for k in KS},
    }


def their_recall(image: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
    """What CLIP_benchmark's ``evaluate`` computes from the features, with its own functions."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = texts @ image.t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owners] = True
    found = {}
    for k in KS:
        forward = batchify(recall_at_k, scores, positive, 64, "cpu", k=k)
        back = batchify(recall_at_k, scores.T, positive.T, 64, "cpu", k=k)
        found[f"image_retrieval_recall@{k}"] = float((forward > 0).float().mean())
        found[f"text_retrieval_recall@{k}"] = float((back > 0).float().mean())
    return found


RECALL = {"ours": our_recall, "clip_benchmark": their_recall}


def peak_memory(who: str, images: int) -> int:
    """Growth of the resident set for one locale in bytes, measured in a separate process."""
    command = [*own_command(__file__), "--peak-memory", who, str(images)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600).stdout)


def print_peak_memory(who: str, images: int) -> None:
    call = RECALL[who]
    call(*pairs(40))  # lets libraries initialise
    features = pairs(images)
    print(resident_growth(lambda: call(*features)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak-memory"]:
        print_peak_memory(sys.argv[2], int(sys.argv[3]))
    else:
        main("eval", run)
