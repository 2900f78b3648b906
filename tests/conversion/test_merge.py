"""Averages of weights equal the documented arithmetic bit for bit, and are models like any other."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from mc2_hpc.cli import main
from mc2_hpc.conversion import model_folder
from mc2_hpc.conversion.convert import convert
from mc2_hpc.conversion.merge import open_sources, write_merged
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import load_clip
from tests.conversion import colours


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, tiny_arch: ClipArchitecture, tokenizers: dict[str, Tokenizer]
) -> list[Path]:
    """Three checkpoints of one architecture."""
    folder = tmp_path_factory.mktemp("models")
    arch = dataclasses.replace(tiny_arch, text=dataclasses.replace(tiny_arch.text, eos_id=2))
    built = [(name, build_clip(arch, seed=seed)) for seed, name in enumerate("abc")]
    with torch.no_grad():
        built[0][1].text.norm_final.bias.fill_(-0.0)  # adding a zero from another model would make it 0.0
    return [colours.write(folder / name, model, tokenizers["xlmv"]) for name, model in built]


def merge(*arguments: object) -> int:
    return main(["merge", *map(str, arguments)])


def arrays(folder: Path) -> dict[str, np.ndarray]:
    files = TensorFiles(folder, "model")
    return {name: files.get(name).numpy() for name in files.names()}


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.5, 1 / 3, 1.0])
def test_two_models_bit_for_bit(alpha: float, models: list[Path], tmp_path: Path) -> None:
    """Each product and the sum rounded to fp32, as NumPy does; the ends are the models themselves."""
    assert merge(*models[:2], "--alpha", f"{alpha:.17f}", "--out", tmp_path / "out") == 0
    a, b = (arrays(model) for model in models[:2])
    found = arrays(tmp_path / "out")
    assert found.keys() == a.keys()
    for name, tensor in found.items():
        share = float(f"{alpha:.17f}")
        expected = np.float32(share) * a[name] + np.float32(1 - share) * b[name]
        if alpha in (0, 1):
            expected = (b, a)[int(alpha)][name]
        assert tensor.dtype == np.float32 and tensor.tobytes() == expected.tobytes(), name


def test_soups_bit_for_bit(models: list[Path], tmp_path: Path) -> None:
    a, b, c = (arrays(model) for model in models)
    assert merge(*models, "--out", tmp_path / "uniform") == 0
    assert merge(*models, "--shares", "0.5,0.2,0.3", "--out", tmp_path / "weighed") == 0
    for folder, shares in (("uniform", [1 / 3] * 3), ("weighed", [0.5, 0.2, 0.3])):
        s, t, u = map(np.float32, shares)
        for name, tensor in arrays(tmp_path / folder).items():
            assert tensor.tobytes() == (s * a[name] + t * b[name] + u * c[name]).tobytes(), name


def test_formats_can_be_mixed(models: list[Path], tmp_path: Path) -> None:
    """A folder of open_clip and one of transformers with only a tokenizer.json, whose tokenizer is rebuilt."""
    theirs = convert(models[0], "open_clip", tmp_path / "oc")
    half = convert(models[1], "hf", tmp_path / "hf")
    (half / "sentencepiece.bpe.model").unlink()
    merge(*models[:2], "--alpha", "0.25", "--out", tmp_path / "expected")
    merge(theirs, half, "--alpha", "0.25", "--out", tmp_path / "found")
    expected, found = (arrays(tmp_path / name) for name in ("expected", "found"))
    assert all(expected[name].tobytes() == found[name].tobytes() for name in expected)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"oc", "hf", "expected", "found"}  # converted copies are gone


def test_a_merged_model_is_a_model(models: list[Path], tmp_path: Path) -> None:
    """It converts, and its card says what it was merged from."""
    out = tmp_path / "merged"
    merge(*models[:2], "--alpha", "0.25", "--out", out)
    model, _ = load_clip(out)
    exported = convert(out, "hf", tmp_path / "hf")
    assert "| merged | 0.25 x a |\n| merged | 0.75 x b |" in (exported / "README.md").read_text()
    back, _ = load_clip(convert(exported, "mc2", tmp_path / "back"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


def test_memory_holds_a_file_not_a_model(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are written when their file is full, so the most that is alive is a file's tensors and one more sum."""
    monkeypatch.setattr(model_folder, "_FILE_BYTES", 100_000)
    alive: list[int] = []
    write = model_folder.write_tensors

    def counted(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        alive.append(sum(tensor.nbytes for tensor in tensors.values()))
        write(path, tensors)

    monkeypatch.setattr(model_folder, "write_tensors", counted)
    with open_sources(models[:2], tmp_path) as sources:
        write_merged(sources, (0.5, 0.5), tmp_path / "out")
        sizes = [sources[0].files.get(name).nbytes for name in sources[0].files.names()]
    assert max(alive) <= max(100_000, *sizes) < sum(sizes) / 3


def other_tokenizer(models: list[Path], tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    shutil.copytree(models[1], folder)
    train_tokenizer(
        ["other words for another tokenizer 42"] * 5, folder / "tokenizer.model", vocab_size=50, style="xlmv"
    )
    return folder


def tokenizer_with(models: list[Path], tmp_path: Path, change: Callable[[Any], object]) -> Path:
    """A model that differs from the second in a part of its tokenizer's file."""
    folder = tmp_path / "other"
    shutil.copytree(models[1], folder)
    proto = sentencepiece_proto.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    change(proto)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


def other_algorithm(models: list[Path], tmp_path: Path) -> Path:
    """BPE's pieces are chosen in another order than those of a unigram model."""
    return tokenizer_with(models, tmp_path, lambda proto: setattr(proto.trainer_spec, "model_type", 2))


def other_spaces(models: list[Path], tmp_path: Path) -> Path:
    return tokenizer_with(models, tmp_path, lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", False))


def no_tokenizer(models: list[Path], tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    shutil.copytree(models[1], folder)
    (folder / "tokenizer.model").write_bytes(b"\xff" * 100)
    return folder


def test_how_a_tokenizer_was_trained_does_not_matter(models: list[Path], tmp_path: Path) -> None:
    other = tokenizer_with(models, tmp_path, lambda proto: proto.trainer_spec.input.append("captions.txt"))
    assert (other / "tokenizer.model").read_bytes() != (models[0] / "tokenizer.model").read_bytes()
    assert merge(models[0], other, "--out", tmp_path / "out") == 0


def other_width(models: list[Path], tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    tokenizer = Tokenizer(models[1] / "tokenizer.model", "xlmv")
    arch = load_clip(models[1])[1].arch
    arch = dataclasses.replace(arch, text=dataclasses.replace(arch.text, width=32))
    return colours.write(folder, build_clip(arch, seed=0), tokenizer)


def not_a_number(models: list[Path], tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    shutil.copytree(models[1], folder)
    tensors = load_file(folder / "model.0.safetensors")
    tensors["text.projection"][0, 0] = torch.nan
    save_file(tensors, folder / "model.0.safetensors")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_tokenizer, "a and .*other cannot be merged: they have different tokenizers, so rows of their token"),
        (other_algorithm, "a and .*other cannot be merged: they have different tokenizers"),
        (other_spaces, "a and .*other cannot be merged: they have different tokenizers"),
        (no_tokenizer, "other/tokenizer.model: not a sentencepiece model"),
        (other_width, "a and .*other cannot be merged: text.width is 64 and 32$"),
        (not_a_number, "text.projection has values that are NaN or infinite"),
        (lambda models, tmp_path: tmp_path / "nowhere", "nowhere: no such folder"),
    ],
)
def test_models_that_do_not_fit(
    make: Callable[..., Path], message: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make(models, tmp_path)
    before = sorted(tmp_path.iterdir())
    assert merge(models[0], other, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("A --out o", "one model is nothing to merge; name two or more"),
        ("A B C --alpha 0.5 --out o", "--alpha: is for two models, not 3; use --shares"),
        ("A B --alpha 1.5 --out o", "--alpha 1.5: must be between 0 and 1"),
        ("A B --alpha x --out o", "--alpha 'x': must be a decimal number"),
        ("A B --alpha 0:1:0.3 --out o", "--alpha: 0:1:0.3: STEP must divide STOP - START"),
        ("A B --alpha 0:1:0 --out o", "--alpha: 0:1:0: STEP must divide STOP - START"),
        ("A B --alpha 0:1:0.1 --out o", "--alpha: several values write nothing; add --suite to score them"),
        ("A B --shares 0.5 --out o", "--shares: 1 numbers for 2 models; give one for each"),
        ("A B --shares 0.5,0.6 --out o", "--shares 0.5,0.6: must be 0 or more and add up to 1"),
        ("A B --shares 2,-1 --out o", "--shares 2,-1: must be 0 or more and add up to 1"),
        ("A B --out A", "exists and is not an empty folder"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: str, message: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = dict(zip("ABC", models, strict=True)) | {"o": tmp_path / "o"}
    assert merge(*(places.get(word, word) for word in arguments.split())) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "o").exists()
