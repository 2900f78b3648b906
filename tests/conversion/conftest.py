"""Small models with random numbers in every tensor, and captions in many scripts."""

import dataclasses
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mc2_hpc.config import load_config
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.models.presets import PRESETS, ClipArchitecture, resolve
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, write_card, write_tensors
from mc2_hpc.quickstart.recipe import Recipe, write_training_config
from tests.conversion import colours

CAPTIONS = [
    "a photograph of the number forty-two, handwritten",
    "Zwei Hunde laufen über eine grüne Wiese.",
    "Un homme en chemise bleue joue de la guitare",
    "Мужчина едет на велосипеде по улице",
    "二匹の犬が緑の草原を走っている",
    "新しいカメラです",
    "ผู้ชายคนหนึ่งกำลังขี่จักรยาน",
    "رجل يركب دراجة في الشارع",
    "한 남자가 거리에서 자전거를 타고 있다",
    "একজন লোক রাস্তায় সাইকেল চালাচ্ছে",
    "አንድ ሰው በመንገድ ላይ ብስክሌት ይነዳል",
    "Sokakta bisiklete binen bir adam, İstanbul'da",
    "Ένας άντρας ΠΑΙΖΕΙ ΚΙΘΑΡΑ ΣΤΟΥΣ ΔΡΟΜΟΥΣ",
    "  spaces   between words ",
    "tabs\tand\nnew lines",
    "ﬁne ① Ｆｕｌｌ ｗｉｄｔｈ＜/s＞",
    "unknown 😀 characters ☃",
    "snake_case, don't! (really?) <b>bold</b> & 50%",
    "",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported models must load without network access."""

    def refuse(*args: object) -> None:
        raise AssertionError(f"network access: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def captions() -> list[str]:
    return CAPTIONS


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A tokenizer of each style, trained on the captions."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [caption for caption in CAPTIONS if "😀" not in caption] * 5
    return {
        style: train_tokenizer(texts, folder / f"{style}.model", vocab_size=600, style=style)
        for style in ("xlmv", "mt5", "gemma")
    }


def _randomise(model: CLIP) -> CLIP:
    """Move every gain and bias away from its initial one or zero, so that swapping two of them is detected."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def _cut(arch: ClipArchitecture, layers: int, vocab_size: int, eos_id: int) -> ClipArchitecture:
    return dataclasses.replace(
        arch,
        vision=dataclasses.replace(arch.vision, layers=min(layers, arch.vision.layers)),
        text=dataclasses.replace(arch.text, layers=min(layers, arch.text.layers), vocab_size=vocab_size, eos_id=eos_id),
    )


@pytest.fixture(scope="session")
def cut_model() -> Callable[..., CLIP]:
    """``cut_model(preset, layers)``: the preset at full width, with few layers and a small vocabulary."""

    def build(preset: str, layers: int = 2, vocab_size: int = 700, eos_id: int = 2) -> CLIP:
        return _randomise(build_clip(_cut(PRESETS[preset], layers, vocab_size, eos_id), seed=0)).eval()

    return build


@pytest.fixture(scope="session")
def tiny_arch() -> ClipArchitecture:
    """Fast to run; all sizes are different."""
    return dataclasses.replace(
        PRESETS["ViT-S-16-worldwide"],
        embed_dim=40,
        vision=dataclasses.replace(
            PRESETS["ViT-S-16-worldwide"].vision, image_size=32, patch_size=8, width=48, layers=3, head_width=16,
            mlp_width=237,
        ),
        text=dataclasses.replace(
            PRESETS["ViT-S-16-worldwide"].text, vocab_size=700, context_length=24, width=64, layers=2, heads=2
        ),
    )  # fmt: skip


@pytest.fixture
def checkpoint(
    tmp_path: Path, tiny_arch: ClipArchitecture, tokenizers: dict[str, Tokenizer]
) -> Callable[..., tuple[Path, CLIP]]:
    """``checkpoint(style, **arch)``: a model folder in our format, with weights in two files, and its model."""

    def write(style: str = "xlmv", **changes: object) -> tuple[Path, CLIP]:
        tokenizer = tokenizers[style]
        arch = dataclasses.replace(tiny_arch, **changes)
        arch = dataclasses.replace(arch, text=dataclasses.replace(arch.text, eos_id=tokenizer.eos_id))
        model = _randomise(build_clip(arch, seed=3)).eval()
        folder = tmp_path / f"step-{style}"
        folder.mkdir()
        state = model.state_dict()
        for tower in ("vision", "text"):
            part = {name: tensor for name, tensor in state.items() if name.startswith(tower)}
            write_tensors(folder / f"model.{tower}.safetensors", part)
        scalars = {name: tensor for name, tensor in state.items() if tensor.ndim == 0}
        write_tensors(folder / "model.scale.safetensors", scalars)
        (folder / TOKENIZER_FILE).write_bytes(tokenizer.model_file.read_bytes())
        write_card(folder, ModelCard(arch=arch, tokenizer_style=style))
        return folder, model

    return write


@pytest.fixture(scope="session")
def quickstart_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Tokenizer]) -> Path:
    """A checkpoint folder of the quickstart's model, with random weights."""
    folder = tmp_path_factory.mktemp("quickstart")
    tokenizer = tokenizers["xlmv"]
    write_training_config(folder / "train.yaml", Recipe(), folder, tokenizer.vocab_size)
    arch = resolve(load_config(folder / "train.yaml").model)
    write_tensors(folder / "model.0.safetensors", _randomise(build_clip(arch, seed=4)).state_dict())
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.model_file.read_bytes())
    write_card(folder, ModelCard(arch=arch, tokenizer_style="xlmv"))
    return folder


@pytest.fixture(scope="session")
def trained_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_arch: ClipArchitecture, tokenizers: dict[str, Tokenizer]
) -> Path:
    """A checkpoint folder of a model that names hues, mostly right."""
    tokenizer = tokenizers["xlmv"]
    return colours.write(tmp_path_factory.mktemp("trained"), colours.trained(tiny_arch, tokenizer), tokenizer)
