"""Models on disk: writing, reading through a memory map, and errors that name what is wrong."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.models.formats import Format, detect_format
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture, num_parameters
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import (
    ModelCard,
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
    """A checkpoint as two ranks would write it."""
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


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_of_a_wrapped_model(folder: Path, model: CLIP, prefix: str) -> None:
    """As ``model.init_from`` reads them."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if "logit_scale" in tensors:
            tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
        write_tensors(path, {prefix + name: tensor for name, tensor in tensors.items()})
    loaded, _ = load_clip(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


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


def test_best_json_stands_for_the_checkpoint_that_it_names(folder: Path) -> None:
    """Also for ``model.init_from``, which asks for the format first."""
    best = folder.parent / "best.json"
    best.write_text(json.dumps({"checkpoint": folder.name, "metric": "set/top-1", "value": 0.5}))
    assert detect_format(best) == Format.OURS
    assert resolve_checkpoint(best) == folder


def test_latest_cannot_lead_elsewhere(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "latest").write_text(str(folder))
    assert resolve_checkpoint(run) == run / "step-3"
    with pytest.raises(UserError, match="no model.json there; name a checkpoint folder"):
        load_clip(run)


def test_files_name_their_framework(folder: Path) -> None:
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
    fails(r"step-3: checkpoint of another model: \S+ is \((8|10), 6\), the config needs \((8|10), 7\)", folder, wider)
    deeper = dataclasses.replace(ARCH, text=dataclasses.replace(ARCH.text, layers=2))
    fails(r"it lacks 'text.transformer.blocks.1.attention.out.bias' \(12 missing, 0 unexpected\)", folder, deeper)
    write_tensors(folder / "model.2.safetensors", {"optimizer": torch.zeros(1)})
    fails(r"it has 'optimizer' \(0 missing, 1 unexpected\)", folder)


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


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2)}, path)
    before = path.read_bytes()

    def fail(tensors: object, target: Path, **_: object) -> None:
        target.write_bytes(before[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mc2_hpc.models.weights.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(path, {"a": torch.zeros(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_used_as_fp32(folder: Path, model: CLIP, dtype: torch.dtype, caplog) -> None:
    path = folder / "model.1.safetensors"
    with safe_open(path, framework="pt") as file:
        write_tensors(path, {name: file.get_tensor(name).to(dtype) for name in file.keys()})
    with caplog.at_level("INFO", logger="mc2_hpc"):
        loaded, _ = load_clip(folder)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, model.state_dict()[name].float(), atol=1e-2, rtol=1e-2)
    assert caplog.text.count("are used as fp32") == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.uint8])
def test_integers_are_not_weights(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "model.1.safetensors"
    with safe_open(path, framework="pt") as file:
        write_tensors(path, {name: file.get_tensor(name).to(dtype) for name in file.keys()})
    fails(f"step-3: [a-z_.0-9]+ is {dtype}; convert weights of fp32", folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    path = folder / "model.1.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).double() for name in file.keys()}
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][3, 1] = value  # 1e300 is finite in fp64 and infinite in fp32
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"{name} has values that are NaN or infinite"):
        load_clip(folder)


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link"])
def test_other_kinds_of_files_in_place_of_weights(folder: Path, kind: str) -> None:
    path = folder / "model.1.safetensors"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    expected = {"pipe": "is a named pipe", "folder": "is a folder", "dangling link": "links to nowhere"}[kind]
    fails(f"model.1.safetensors: {expected}", folder)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("text", "layers", 10**6, r"model.text.layers=1000000: must be at most 1,024"),
        ("vision", "width", 10**18, r"arch.vision.width: expected int <="),
        ("vision", "width", 2 * 10**9, r"model.vision.width=2000000000: must be at most 131,072"),
        ("vision", "image_size", 10**8, r"model.vision.image_size=100000000: must be at most 16,384"),
        ("text", "vocab_size", 2**24, r"checkpoint of another model"),
        ("text", "width", True, r"\$.arch.text.width: expected a whole number, found true or false"),
        ("text", "heads", None, r"\$.arch.text.heads: expected a whole number, found null"),
    ],
)
def test_sizes_are_bounded_before_anything_is_built(
    folder: Path, section: str, key: str, value: object, message: str
) -> None:
    path = folder / "model.json"
    card = json.loads(path.read_text())
    card["arch"][section][key] = value
    path.write_text(json.dumps(card))
    fails(f"{message}", folder)


def test_two_files_with_one_tensor(folder: Path) -> None:
    (folder / "model.2.safetensors").write_bytes((folder / "model.1.safetensors").read_bytes())
    fails(r"model.2.safetensors: has '[a-z_.0-9]+', which is also in model.1.safetensors; remove one", folder)


@pytest.mark.parametrize("content", ["", " \n", "x" * 5000, "a\0b"])
def test_a_latest_that_names_nothing(folder: Path, content: str) -> None:
    (folder.parent / "latest").write_text(content)
    fails("latest: ", folder.parent)


def test_parameters_are_counted_from_sizes(model: CLIP) -> None:
    assert num_parameters(ARCH) == sum(parameter.numel() for parameter in model.parameters())
