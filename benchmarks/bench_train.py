"""Training a small model end to end, compared with open_clip's own program: same shards, batch, sizes, two processes.

Both read tars of JPEGs and captions, decode, crop, tokenise and train in fp32, each in its default way. open_clip uses
webdataset, Pillow, Hugging Face tokenizers and DDP with ``--local-loss --gather-with-grad``; ours is ``mc2 train`` at
ZeRO stage 1. The two runs alternate, and each run's first steps are excluded.

``train`` has the 1,000-odd token rows that the captions need; ``train_full_vocab`` the 901,629 of a worldwide model, of
which the same captions use the same few.
"""

import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks.harness import main, spread
from mc2_hpc.conversion.tokenizer_files import write_tokenizer
from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.data.shards import Pair
from mc2_hpc.data.tokenizer import train_tokenizer

PROCESSES = 2
VISION = {"image_size": 224, "patch_size": 32, "width": 256, "layers": 6, "head_width": 64}
TEXT = {"context_length": 77, "width": 256, "heads": 4, "layers": 6}
EMBED_DIM = 256
LOG_EVERY, WARMUP_ROWS = 4, 2
FULL_VOCABULARY = 901_629


def run(quick: bool) -> dict[str, Any]:
    """Samples per second of both programs, run alternately, at both sizes of the token table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab_size = make_data(folder, num_images=256 if quick else 2048)
        # (what, rows of the token table, rounds, steps, pairs per process)
        sizes = [
            ("train", vocab_size, *((1, 4, 8) if quick else (5, 20, 64))),
            # A smoke test does not wait for tables of a gigabyte to be initialised and saved.
            ("train_full_vocab", 100_000 if quick else FULL_VOCABULARY, *((1, 4, 4) if quick else (3, 16, 8))),
        ]
        measured = [_measure(folder, *size, log_every=1 if quick else LOG_EVERY) for size in sizes]
    (_, toy), (_, full) = measured
    return {
        "config": {
            "vision": VISION,
            "text": TEXT,
            "embed_dim": EMBED_DIM,
            "processes": PROCESSES,
            "precision": "fp32",
            "images": "640x480 JPEG",
            "sizes": [
                {"what": what, "token_rows": rows, "steps": steps, "global_batch": batch * PROCESSES}
                for what, rows, _, steps, batch in sizes
            ],
        },
        "rows": [row for rows, _ in measured for row in rows],
        "ratios": {"samples_per_second_vs_open_clip": toy, "full_vocab_vs_open_clip": full},
    }


def _measure(
    folder: Path, what: str, token_rows: int, rounds: int, steps: int, batch: int, *, log_every: int
) -> tuple[list[dict[str, Any]], float]:
    """One row per program, and the median of the rounds' ratios."""
    rates: dict[str, list[float]] = {"ours": [], "open_clip": []}
    for _ in range(rounds):
        for who, call in (("ours", _ours), ("open_clip", _open_clip)):
            output = folder / "run"
            rates[who].append(call(output, folder, token_rows, steps, batch, log_every))
            shutil.rmtree(output)  # gigabytes at the full vocabulary
    rows = [
        {"what": what, "who": who, "unit": "samples/s", **spread(found), "samples": found}
        for who, found in rates.items()
    ]
    return rows, statistics.median(a / b for a, b in zip(rates["ours"], rates["open_clip"], strict=True))


def make_data(folder: Path, num_images: int) -> int:
    """Write 640x480 crops of scikit-learn's two photographs with quickstart captions; returns the vocabulary size."""
    from sklearn.datasets import load_sample_images

    from mc2_hpc.quickstart.captions import LANGUAGES, draw_caption, number_names

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    names = number_names()

    def pairs() -> Iterator[Pair]:
        for number in range(num_images):
            photo = photos[number % len(photos)]
            width = int(rng.integers(320, 560))
            height = width * 3 // 4
            x, y = int(rng.integers(0, photo.width - width)), int(rng.integers(0, photo.height - height))
            image = photo.crop((x, y, x + width, y + height)).resize((640, 480), Image.Resampling.BICUBIC)
            data = io.BytesIO()
            image.save(data, "JPEG", quality=90)
            lang = LANGUAGES[number % len(LANGUAGES)]
            text = draw_caption(lang, names[lang][number % 100], rng)
            yield Pair(key=f"{number:06d}", image=data.getvalue(), text=text, lang=lang)

    pack_pairs(pairs(), folder / "shards", pairs_per_shard=128)
    texts = [draw_caption(lang, name, rng) for lang in LANGUAGES for name in names[lang]]
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", vocab_size=1000, style="xlmv")
    (folder / "hf").mkdir()
    write_tokenizer(folder / "tokenizer.model", "xlmv", TEXT["context_length"], folder / "hf")
    return tokenizer.vocab_size


def _launch(*arguments: str | Path) -> str:
    """Run a program in both processes, with one torch thread each; returns its output."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = result.stdout + result.stderr
    if result.returncode:
        raise RuntimeError(f"{arguments}: exit code {result.returncode}\n{output[-12000:]}")
    return output


def run_values(output: Path, folder: Path, vocab_size: int, steps: int, batch: int, log_every: int) -> dict[str, Any]:
    """Our run's config as plain values; the data are those of :func:`make_data`."""
    return {
        "output": str(output),
        "steps": steps,
        "global_batch": batch * PROCESSES,
        "precision": "fp32",
        "log_every": log_every,
        "model": {
            "preset": "ViT-B-32-worldwide",
            "embed_dim": EMBED_DIM,
            "vision": VISION,
            "text": {"vocab_size": vocab_size, **TEXT},
        },
        "data": {
            "train": str(folder / "shards"),
            "tokenizer": str(folder / "tokenizer.model"),
            "lanes": min(16, batch * PROCESSES),
            "workers": 1,
        },
        "optim": {"warmup": 10},
        "zero": {"stage": 1},
        "checkpoint": {"every": steps},
    }


def _ours(output: Path, folder: Path, vocab_size: int, steps: int, batch: int, log_every: int) -> float:
    return train_rate(run_values(output, folder, vocab_size, steps, batch, log_every), folder)


def train_rate(config: dict[str, Any], folder: Path) -> float:
    """Samples per second of ``mc2 train`` in both processes, without the first rows."""
    path, output = folder / "ours.yaml", Path(config["output"])
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    _launch("-m", "mc2_hpc.cli", "train", path)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["samples_per_second"] for row in rows[WARMUP_ROWS:])


def _open_clip(output: Path, folder: Path, vocab_size: int, steps: int, batch: int, log_every: int) -> float:
    model = {
        "embed_dim": EMBED_DIM,
        "vision_cfg": VISION,
        "text_cfg": {
            "hf_tokenizer_name": str(folder / "hf"),
            "pool_type": "eos",
            "eos_id": 2,
            "vocab_size": vocab_size,
            **TEXT,
        },
    }
    configs = folder / "models"
    configs.mkdir(exist_ok=True)
    (configs / "bench.json").write_text(json.dumps(model), encoding="utf-8")
    shards = sorted((folder / "shards").glob("*.tar"))
    pattern = f"{folder / 'shards'}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"
    arguments = [
        *("--model", "bench", "--train-data", pattern, "--dataset-type", "webdataset", "--dataset-resampled"),
        *("--train-num-samples", str(steps * batch * PROCESSES), "--batch-size", str(batch), "--workers", "1"),
        *("--precision", "fp32", "--epochs", "1", "--warmup", "10", "--lr", "4e-4", "--dist-backend", "gloo"),
        *("--local-loss", "--gather-with-grad", "--log-every-n-steps", str(log_every)),
        *("--logs", str(output), "--name", "bench", "--save-frequency", "0"),
    ]
    text = _launch(Path(__file__).parent / "peer_open_clip_train.py", configs, json.dumps(arguments))
    # The mean seconds per step of each log window; the rate printed beside it covers only the window's last step.
    found = [batch * PROCESSES / float(seconds) for seconds in re.findall(r"Batch \(t\): ([\d.]+)", text)]
    if len(found) <= WARMUP_ROWS + 1:
        raise RuntimeError(f"open_clip printed {len(found)} rates:\n{text[-3000:]}")
    return statistics.median(found[WARMUP_ROWS:])


if __name__ == "__main__":
    main("train", run)
