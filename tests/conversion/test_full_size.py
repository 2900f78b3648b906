"""The full H/14 (1.86 billion parameters) through every conversion: bits, logits and memory.

Each step runs in its own process, whose anonymous memory is measured: the system can always reclaim memory mapped from
files. Needs 25 GB of disk and 12 GB of memory; takes a few minutes.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mc2_hpc.conversion.convert import convert
from mc2_hpc.conversion.peers import import_open_clip, import_transformers
from mc2_hpc.data.tokenizer import train_tokenizer
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import PRESETS
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, load_clip, write_card, write_tensors
from mc2_hpc.storage import remove_folder

PRESET = "ViT-H-14-worldwide-quickgelu"
ONE_COPY = 4 * 1_858_783_745  # bytes


def make(folder: str) -> None:
    model = build_clip(PRESETS[PRESET], seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape), alpha=0.02)
    write_tensors(Path(folder) / "model.safetensors", model.state_dict())
    train_tokenizer(["a number", "eine Zahl"] * 50, Path(folder) / TOKENIZER_FILE, vocab_size=40, style="xlmv")
    write_card(Path(folder), ModelCard(arch=PRESETS[PRESET], tokenizer_style="xlmv"))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 901_629, (3, 77), generator=generator)
    for row, end in enumerate((5, 30, 76)):
        tokens[row, end] = 2
        tokens[row, end + 1 :] = 1
    return torch.randn(2, 3, 224, 224, generator=generator), tokens


@torch.no_grad()
def our_logits(folder: str, result: str) -> None:
    image, text, scale = load_clip(folder)[0](*batch())
    write_tensors(Path(result), {"logits": scale.exp() * image @ text.T})


@torch.no_grad()
def open_clip_logits(folder: str, result: str) -> None:
    model, _, _ = import_open_clip().create_model_and_transforms(f"local-dir:{folder}")
    image, text, scale = model.eval()(*batch())
    write_tensors(Path(result), {"logits": scale * image @ text.T})


@torch.no_grad()
def transformers_logits(folder: str, result: str) -> None:
    model = import_transformers().MetaClip2Model.from_pretrained(folder).eval()
    images, tokens = batch()
    write_tensors(Path(result), {"logits": model(pixel_values=images, input_ids=tokens).logits_per_image})


STEPS: dict[str, Callable[..., object]] = {
    step.__name__: step for step in (make, convert, our_logits, open_clip_logits, transformers_logits)
}


def run(step: str, *arguments: object) -> int:
    """Run a step in its own process; returns its peak anonymous memory in bytes, without that of its imports."""
    process = subprocess.Popen(
        [sys.executable, __file__, step, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "imported\n"
    base = peak = anonymous_bytes(process.pid)
    process.stdin.write("go\n")
    process.stdin.flush()
    deadline = time.monotonic() + 1800
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        assert time.monotonic() < deadline, f"{step} takes longer than half an hour"
        time.sleep(0.01)
    assert process.returncode == 0
    copies = (peak - base) / ONE_COPY
    print(f"{step} {arguments[1] if step == 'convert' else ''}: peak {copies:.2f} copies, {(peak - base) / 1e9:.2f} GB")
    return peak - base


def anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0  # the process is ending


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full")
    run("make", folder / "ours")
    run("our_logits", folder / "ours", folder / "ours.safetensors")
    yield folder
    remove_folder(folder)


def assert_same_bits(a: Path, b: Path) -> None:
    ours, theirs = TensorFiles(a, "model"), TensorFiles(b, "model")
    assert ours.names() == theirs.names()
    for name in ours.names():
        assert torch.equal(ours.get(name), theirs.get(name)), name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("to", "peer_logits"), [("open_clip", "open_clip_logits"), ("hf", "transformers_logits")])
def test_there_and_back(full: Path, to: str, peer_logits: str) -> None:
    there, back = full / to, full / "back"
    assert run("convert", full / "ours", to, there) < 0.3 * ONE_COPY
    run(peer_logits, there, full / f"{to}.safetensors")
    ours, theirs = (load_file(full / f"{name}.safetensors")["logits"] for name in ("ours", to))
    print(f"{to}: largest difference of logits {(ours - theirs).abs().max():.2e}, of {ours.abs().max():.2f}")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert run("convert", there, "mc2", back) < 0.3 * ONE_COPY
    remove_folder(there)
    assert_same_bits(full / "ours", back)
    remove_folder(back)


if __name__ == "__main__":
    print("imported", flush=True)
    sys.stdin.readline()
    STEPS[sys.argv[1]](*sys.argv[2:])
