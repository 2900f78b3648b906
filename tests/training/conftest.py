"""A tiny pool to train on, and running scripts under torchrun."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.data.shards import Pair
from mc2_hpc.data.tokenizer import train_tokenizer

Torchrun = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """``torchrun(processes, *arguments, check=True)``: run a script or ``-m module`` on several gloo ranks."""

    def run(processes: int, *arguments: str | Path, check: bool = True, timeout: float = 240):
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        result = subprocess.run(
            [sys.executable, "-m", *launcher, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and result.returncode:
            pytest.fail(f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
        return result

    return run


@dataclass(frozen=True)
class TinyPool:
    """A learnable plain pool: 512 coloured squares with their captions, and a tokenizer."""

    shards: Path
    tokenizer: Path
    vocab_size: int


@pytest.fixture(scope="session")
def tiny_pool(tmp_path_factory) -> TinyPool:
    """Shared and read-only: tests that damage shards copy them first."""
    folder = tmp_path_factory.mktemp("pool")
    names = ["red", "lime", "blue", "yellow", "cyan", "magenta", "white", "black"]
    pairs = []
    for number in range(512):
        inside, outside = names[number % 8], names[number // 8 % 8]
        picture = Image.new("RGB", (40, 40), outside)
        picture.paste(inside, (8 + number % 5, 8 + number % 7, 32, 32))
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=90)
        text = f"a {inside} square on {outside} ground, number {number % 3}"
        pairs.append(Pair(key=f"{number:06d}", image=data.getvalue(), text=text, lang="en"))
    pack_pairs(pairs, folder / "shards", pairs_per_shard=64)
    tokenizer = train_tokenizer((p.text for p in pairs), folder / "sp.model", vocab_size=64, style="xlmv")
    return TinyPool(shards=folder / "shards", tokenizer=folder / "sp.model", vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def module_config(tiny_pool, tmp_path_factory) -> Path:
    """A run of fp32 steps on the tiny pool."""
    folder = tmp_path_factory.mktemp("config")
    path = folder / "tiny.yaml"
    path.write_text(
        f"""\
output: {folder / "run"}
steps: 12
global_batch: 32
precision: fp32
log_every: 2
model:
  preset: ViT-S-16-worldwide
  embed_dim: 32
  vision: {{image_size: 32, width: 64, layers: 2, head_width: 32}}
  text: {{vocab_size: {tiny_pool.vocab_size}, context_length: 24, width: 48, heads: 3, layers: 2}}
data:
  train: {tiny_pool.shards}
  tokenizer: {tiny_pool.tokenizer}
  lanes: 8
  workers: 0
optim: {{lr: 1.0e-3, warmup: 4}}
zero: {{stage: 1}}
checkpoint: {{every: 6, keep: 2}}
""",
        encoding="utf-8",
    )
    return path
