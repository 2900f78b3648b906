"""Weights exported in half precision: what the two libraries load, and what comes back."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import mc2_hpc
from mc2_hpc.cli import main
from mc2_hpc.conversion.convert import convert
from mc2_hpc.conversion.model_folder import DTYPES
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.tensor_files import TensorFiles
from tests.conversion import colours

Checkpoint = Callable[..., tuple[Path, CLIP]]
CLOSE = {"bf16": 0.999, "fp16": 0.99999}
"""Least cosine of a feature and the same one from fp32 weights."""


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_features_are_close(to: str, dtype: str, trained_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    assert main(["convert", str(trained_checkpoint), "--to", to, "--dtype", dtype, "--out", str(out)]) == 0
    (file,) = out.glob("*.safetensors")
    types = {name: tensor.dtype for name, tensor in load_file(file).items()}
    assert types.pop("logit_scale") == torch.float32
    assert set(types.values()) == {DTYPES[dtype]}
    ours, theirs = (mc2_hpc.load(folder, device="cpu") for folder in (trained_checkpoint, out))
    assert theirs.dual.logits()[0] == pytest.approx(ours.dual.logits()[0], rel=1e-6)
    images = [colours.picture(pixels) for pixels in colours.draw(8, 3)[0]]
    for features in (
        [clip.encode_image(images) for clip in (ours, theirs)],
        [clip.encode_text(colours.NAMES) for clip in (ours, theirs)],
    ):
        cosines = F.cosine_similarity(*features)
        assert CLOSE[dtype] < cosines.min() and not torch.equal(*features)


@pytest.mark.parametrize("dtype", CLOSE)
@torch.no_grad()
def test_transformers_computes_in_that_type(
    dtype: str, trained_checkpoint: Path, tmp_path: Path, transformers: ModuleType
) -> None:
    """As it loads the folder by default, every parameter in it has the type, the logit scale included."""
    out = convert(trained_checkpoint, "hf", tmp_path / "half", dtype=dtype)
    model, report = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[dtype]}
    scale = mc2_hpc.load(trained_checkpoint, device="cpu").dual.logits()[0]
    assert float(model.logit_scale.float().exp()) == pytest.approx(scale, rel=0.01)
    inputs = transformers.AutoTokenizer.from_pretrained(out)(colours.NAMES, padding=True, return_tensors="pt")
    expected = mc2_hpc.load(trained_checkpoint, device="cpu").encode_text(colours.NAMES)
    found = model.get_text_features(**inputs).pooler_output.float()
    assert F.cosine_similarity(found, expected).min() > CLOSE[dtype] - 1e-3


@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_back_and_forth(to: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Half precision widens exactly, and an exported folder can be rounded itself."""
    source, _ = checkpoint()
    half = convert(source, to, tmp_path / "half", dtype="bf16")
    back, ours = TensorFiles(convert(half, "mc2", tmp_path / "back"), "model"), TensorFiles(source, "model")
    for name in ours.names():
        expected = ours.get(name) if name == "logit_scale" else ours.get(name).bfloat16().float()
        assert torch.equal(back.get(name), expected), name
    again = convert(convert(source, to, tmp_path / "whole"), to, tmp_path / "again", dtype="bf16")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in half.iterdir()}


def test_what_does_not_fit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, _ = checkpoint()
    path = source / "model.text.safetensors"
    tensors = load_file(path)
    tensors["text.projection"][3, 4] = 70_000
    save_file(tensors, path)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"text.projection has values too large for torch.float16; choose --dtype bf16"):
        convert(source, "hf", out, dtype="fp16")
    assert not out.exists()
    convert(source, "hf", out, dtype="bf16")
    for to, dtype in (("mc2", "bf16"), ("onnx", "fp16"), ("hf", "fp8")):
        with pytest.raises(UserError, match=rf"^--dtype {dtype} --to {to}: choose fp32, bf16, fp16, with --to open_cl"):
            convert(source, to, tmp_path / "no", dtype=dtype)
