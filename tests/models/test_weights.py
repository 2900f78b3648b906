"""Models on disk: what is written is read back by memory map, and what is wrong is named."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture
from mc2_hpc.models.weights import (
    ModelCard,
    TensorFiles,
    load_clip,
    read_card,
    resolve_checkpoint,
    write_card,
    write_tensors,
)

ARCH = ClipArchitecture(
    embed_dim=6,
    quick_gelu=True,
    vision=VisionArchitecture(image_size=8, patch_size=4, width=8, layers=1, head_width=4, mlp_width=12),
    text=TextArchitecture(vocab_size=9, context_length=5, eos_id=2, width=10, layers=1, heads=2),
    eval_resize="squash",
)


@pytest.fixture
def model() -> CLIP:
    return build_clip(ARCH, seed=0)


@pytest.fixture
def folder(tmp_path: Path, model: CLIP) -> Path:
    """A checkpoint as two ranks would have written it."""
    path = tmp_path / "step-3"
    state = model.state_dict()
    for rank, names in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        write_tensors(path / f"model.{rank}.safetensors", {name: state[name] for name in names})
    write_card(path, ModelCard(arch=ARCH, tokenizer_style="mt5"))
    return path


def test_read_back(folder: Path, model: CLIP) -> None:
    loaded, card = load_clip(folder)
    assert card == ModelCard(arch=ARCH, tokenizer_style="mt5")
    assert loaded.arch == ARCH
    assert not loaded.training
    for (name, ours), (_, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_run_folder_or_checkpoints_folder_will_do(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(tmp_path / "checkpoints")  # not found below the run folder
    with pytest.raises(
        UserError, match=r"run: no checkpoint there \(looked for model.json, latest, checkpoints/latest"
    ):
        resolve_checkpoint(run)
    (run / "checkpoints").mkdir()
    (tmp_path / "checkpoints").rename(run / "checkpoints" / "step-3")
    (run / "checkpoints" / "latest").write_text("step-3\n")
    assert resolve_checkpoint(run) == run / "checkpoints" / "step-3"
    assert resolve_checkpoint(str(run / "checkpoints")) == run / "checkpoints" / "step-3"
    assert resolve_checkpoint(run / "checkpoints" / "step-3") == run / "checkpoints" / "step-3"
    load_clip(run)


def test_latest_cannot_lead_elsewhere(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "latest").write_text(str(folder))
    assert resolve_checkpoint(run) == run / "step-3"
    with pytest.raises(UserError, match="no model.json there; name a checkpoint folder"):
        load_clip(run)


def test_files_name_the_library_they_are_for(folder: Path) -> None:
    with safe_open(folder / "model.0.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_non_contiguous_and_empty_mappings_are_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.x.safetensors", {"t": torch.arange(6.0).view(2, 3).T})
    write_tensors(tmp_path / "a.y.safetensors", {})
    files = TensorFiles(tmp_path, "a")
    assert files.names() == ["t"] and "t" in files and "u" not in files
    assert torch.equal(files.get("t"), torch.arange(6.0).view(2, 3).T)


def fails(message: str, folder: Path, arch: ClipArchitecture | None = None) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_clip(folder, arch)
    assert "\n" not in str(error.value)


def test_wrong_cards(folder: Path) -> None:
    path = folder / "model.json"
    good = json.loads(path.read_text())
    for bad in ([], {}, {"arch": good["arch"]}, {**good, "arch": {**good["arch"], "depth": 3}}, {**good, "arch": 3}):
        path.write_text(json.dumps(bad))
        fails("model.json: not a model description of this program", folder)
    path.write_text(json.dumps({**good, "arch": {**good["arch"], "embed_dim": "wide"}}))
    fails("model.json: not a model description of this program", folder)
    path.write_text("{")
    fails("model.json: not valid JSON", folder)
    path.unlink()
    with pytest.raises(
        UserError, match=r"no model.json there; name a checkpoint folder \(runs/<name>/checkpoints/step"
    ):
        read_card(folder)


def test_weights_of_another_model(folder: Path, model: CLIP) -> None:
    wider = dataclasses.replace(ARCH, embed_dim=7)
    fails(r"step-3: checkpoint of another model: \S+ is \((8|10), 6\), the config wants \((8|10), 7\)", folder, wider)
    deeper = dataclasses.replace(ARCH, text=dataclasses.replace(ARCH.text, layers=2))
    fails(r"it lacks 'text.transformer.blocks.1.attention.out.bias' \(12 missing, 0 extra\)", folder, deeper)
    write_tensors(folder / "model.2.safetensors", {"optimizer": torch.zeros(1)})
    fails(r"it has 'optimizer' \(0 missing, 1 extra\)", folder)


def test_damaged_and_missing_files(folder: Path) -> None:
    path = folder / "model.1.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    fails("model.1.safetensors: damaged safetensors file", folder)
    path.write_bytes(b"")
    fails("model.1.safetensors: damaged safetensors file", folder)
    path.unlink()
    fails(r"checkpoint of another model: it lacks ", folder)
    (folder / "model.0.safetensors").unlink()
    fails(r"no model.\*.safetensors there", folder)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    with pytest.raises((ValueError, RuntimeError)):
        write_tensors(path, {"a": torch.ones(2).to_sparse()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
