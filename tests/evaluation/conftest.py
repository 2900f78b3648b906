"""A tiny untrained checkpoint, images for it, and the process group that evaluation runs in."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.distributed import process_group
from mc2_hpc.evaluation.encoder import Encoder
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, write_card, write_tensors

SENTENCES = [
    "a photo of a cat",
    "ein Foto von einem Hund",
    "фотография кошки",
    "猫の写真",
    "question and option 0123456789",
]


def _noise(seed: int, *, kind: str = "JPEG", size: tuple[int, int] = (40, 48)) -> bytes:
    """An encoded image of blocks of random colours."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(data, kind)
    return data.getvalue()


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Tokenizer]:
    """``make_checkpoint(folder, sentences, vocab_size)``: random weights and a tokenizer trained on the sentences."""

    def make(folder: Path, sentences: Sequence[str], vocab_size: int) -> Tokenizer:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(sentences, folder / TOKENIZER_FILE, vocab_size=vocab_size, style="xlmv")
        arch = ClipArchitecture(
            embed_dim=16,
            quick_gelu=False,
            vision=VisionArchitecture(image_size=32, patch_size=16, width=32, layers=1, head_width=16, mlp_width=64),
            text=TextArchitecture(
                vocab_size=tokenizer.vocab_size, context_length=24, eos_id=2, width=32, layers=1, heads=2
            ),
        )
        write_card(folder, ModelCard(arch=arch, tokenizer_style="xlmv"))
        write_tensors(folder / "model.00000-of-00001.safetensors", build_clip(arch, seed=0).state_dict())
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint, tmp_path_factory) -> Path:
    """A checkpoint folder with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, SENTENCES * 3, 80)
    return folder


@pytest.fixture
def ranks():
    """Only this process."""
    with process_group(60) as ranks:
        yield ranks


@pytest.fixture
def encoder(tiny_checkpoint, ranks) -> Encoder:
    return Encoder.load(tiny_checkpoint, ranks, batch=7)


@pytest.fixture(scope="session")
def noise() -> Callable[..., bytes]:
    """``noise(seed, kind="JPEG", size=(40, 48))``: an encoded image of blocks of random colours."""
    return _noise


@pytest.fixture
def image_folder(tmp_path, noise) -> Path:
    """Ten images 00.jpg ... 09.jpg in a folder ``images``."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number:02d}.jpg").write_bytes(noise(number))
    return folder
