"""Graphs give our logits at every size of the family, and folders hold all that running them needs."""

import dataclasses
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pytest
import torch
from PIL import Image

import mc2_hpc
from mc2_hpc.cli import main
from mc2_hpc.conversion.convert import convert
from mc2_hpc.conversion.onnx import export_image_tower, export_text_tower
from mc2_hpc.conversion.onnx_facts import CLEANING, OPSET, read_onnx_facts
from mc2_hpc.curation.filtering.images import PoolImage
from mc2_hpc.data.tokenizer import STYLES
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.image_features import ClipFeatures
from mc2_hpc.filters import ClipScore
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.models.presets import PRESETS, ClipArchitecture
from tests.conversion import colours
from tests.conversion.test_parity import batch, our_logits

TOLERANCE = 1e-4
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_zero_shot.py"
Checkpoint = Callable[..., tuple[Path, CLIP]]


@pytest.fixture(scope="module", autouse=True)
def no_trace() -> Iterator[None]:
    """torch traces an export in thousands of log records, which pytest would keep."""
    trace = logging.getLogger("torch.__trace")
    before, trace.disabled = trace.disabled, True
    yield
    trace.disabled = before


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, inputs: torch.Tensor) -> torch.Tensor:
    """Features from a graph with a single input and output."""
    graph = session(path)
    (features,) = graph.run(None, {graph.get_inputs()[0].name: inputs.numpy()})
    return torch.from_numpy(features)


def shrunk(arch: ClipArchitecture) -> ClipArchitecture:
    """One layer per tower, 8 channels per head, few tokens; images, patches, heads and activation as they are."""
    vision, text = arch.vision, arch.text
    width = vision.width // vision.head_width * 8
    small_vision = dataclasses.replace(
        vision, layers=1, width=width, head_width=8, mlp_width=vision.mlp_width * width // vision.width
    )
    small_text = dataclasses.replace(text, layers=1, width=8 * text.heads, vocab_size=50)
    return dataclasses.replace(arch, embed_dim=24, vision=small_vision, text=small_text)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[CLIP], tuple[Path, Path]]:
    """``towers(model)``: both graphs. Presets share towers, and each is exported once."""
    folder = tmp_path_factory.mktemp("towers")
    paths: dict[object, Path] = {}

    def export(model: CLIP) -> tuple[Path, Path]:
        arch = model.arch
        found = []
        for write, key in (
            (export_image_tower, (arch.vision, arch.quick_gelu)),
            (export_text_tower, (arch.text, arch.quick_gelu)),
        ):
            if key not in paths:
                paths[key] = folder / f"{len(paths)}.onnx"
                write(model, paths[key], ("inputs", "features"))
            found.append(paths[key])
        return found[0], found[1]

    return export


IN_EVERY_RUN = {
    *("ViT-S-16-worldwide", "ViT-M-16-worldwide-mt5", "ViT-B-32-worldwide-384", "ViT-B-16-worldwide"),
    *("ViT-L-14-worldwide-mt5", "ViT-H-14-worldwide-quickgelu", "ViT-H-14-worldwide-378", "ViT-bigG-14-worldwide"),
}
"""Presets of every size; the others are slow tests."""


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.slow) for name in PRESETS]
)
def test_logits_agree_for_every_preset(preset: str, towers: Callable[[CLIP], tuple[Path, Path]]) -> None:
    model = build_clip(shrunk(PRESETS[preset]), seed=0).eval()
    with torch.random.fork_rng(devices=[]):  # the same weights for each preset with this text tower
        torch.manual_seed(1)
        model.text.init_parameters()
    images, tokens = batch(model)
    expected = our_logits(model, images, tokens)
    assert expected.std() > 0.05  # comparing constants would prove nothing
    image, text = towers(model)
    scale = model.logit_scale.detach().exp()
    torch.testing.assert_close(scale * run(image, images) @ run(text, tokens).T, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def quickstart_model(tmp_path_factory: pytest.TempPathFactory, quickstart_checkpoint: Path) -> Path:
    return convert(quickstart_checkpoint, "onnx", tmp_path_factory.mktemp("exported") / "onnx")


def test_the_quickstarts_model_in_full(quickstart_model: Path, quickstart_checkpoint: Path) -> None:
    """Batches of 1 to 7, and rows of 2 tokens to the context length."""
    clip = mc2_hpc.load(quickstart_checkpoint, device="cpu")
    model: CLIP = clip.model  # type: ignore[assignment]
    facts = read_onnx_facts(quickstart_model)
    assert facts.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    generator = torch.Generator().manual_seed(2)
    for size, length in ((1, 2), (3, 8), (7, 77)):
        images = torch.randn(size, 3, 32, 32, generator=generator)
        tokens = torch.randint(4, model.arch.text.vocab_size, (size, length), generator=generator)
        tokens[:, -1] = 2
        found = run(quickstart_model / "image.onnx", images) @ run(quickstart_model / "text.onnx", tokens).T
        torch.testing.assert_close(facts.logit_scale * found, our_logits(model, images, tokens), atol=TOLERANCE, rtol=0)


def test_what_a_graph_says(quickstart_model: Path) -> None:
    """Names, dynamic sizes, the operators' version, weights in another file, and nothing about this machine."""
    for name, given, sizes in (
        ("image", "pixel_values", ["batch", 3, 32, 32]),
        ("text", "input_ids", ["batch", "tokens"]),
    ):
        path = quickstart_model / f"{name}.onnx"
        graph = session(path)
        assert [(i.name, i.shape) for i in graph.get_inputs()] == [(given, sizes)]
        assert [(o.name, o.shape) for o in graph.get_outputs()] == [(f"{name}_features", ["batch", 128])]
        model = onnx.load(path, load_external_data=False)
        assert [(s.domain, s.version) for s in model.opset_import] == [("", OPSET)]
        assert {entry.value for weight in model.graph.initializer for entry in weight.external_data} >= {
            f"{name}.onnx.data"
        }
        assert str(Path(mc2_hpc.__file__).parent).encode() not in path.read_bytes()
    assert not (quickstart_model / "fp32").exists()


def test_the_command_gives_the_same_bytes(
    quickstart_model: Path, quickstart_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    assert main(["convert", str(quickstart_checkpoint), "--to", "onnx", "--out", str(again)]) == 0
    assert capfd.readouterr().out == f"{again}\n"
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in quickstart_model.iterdir()
    }


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A lossless image that is neither square nor as large as the model's."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((65, 47), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


TEXTS = ["A cat!", "Zwei Hunde laufen über eine grüne Wiese.", "  猫 ", "ΟΔΟΣ ☃", "long " * 30]


@pytest.mark.parametrize(("style", "resize"), [("xlmv", "shortest"), ("mt5", "squash")])
def test_the_example_needs_neither_torch_nor_this_package(
    style: str, resize: str, checkpoint: Checkpoint, photo: Path, tmp_path: Path
) -> None:
    source, model = checkpoint(style, eval_resize=resize)
    out = convert(source, "onnx", tmp_path / "onnx")
    without = "import runpy, sys; sys.modules['torch'] = sys.modules['mc2_hpc'] = sys.modules['transformers'] = None"
    code = f"{without}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [EXAMPLE, out, photo, *TEXTS]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    clip = mc2_hpc.load(source, device="cpu")
    scale = model.logit_scale.detach().exp()
    with Image.open(photo) as image:
        odds = (scale * clip.encode_text(TEXTS) @ clip.encode_image(image)).softmax(0)
    assert odds.max() < 0.9  # rounded shares of a certain answer would prove nothing
    printed = [float(line.split("%")[0]) for line in done.stdout.splitlines()]
    assert printed == pytest.approx((100 * odds).tolist(), abs=0.2)


@pytest.mark.parametrize("style", STYLES)
def test_cleaning_is_described(style: str, captions: list[str]) -> None:
    steps = runpy.run_path(str(EXAMPLE))["CLEANING"]
    clean = STYLES[style].clean or str
    for caption in captions:
        described = caption
        for step in CLEANING[style]:
            described = steps[step](described)
        assert described == clean(caption)


@pytest.fixture(scope="module")
def int8_model(tmp_path_factory: pytest.TempPathFactory, trained_checkpoint: Path) -> Path:
    return convert(trained_checkpoint, "onnx", tmp_path_factory.mktemp("exported") / "int8", int8=True)


def test_int8_costs_less_than_a_point(trained_checkpoint: Path, int8_model: Path) -> None:
    assert read_onnx_facts(int8_model).weights == "int8"
    before, after = colours.accuracy(trained_checkpoint), colours.accuracy(int8_model)
    assert 0.85 < before < 1
    assert after > before - 0.01
    assert not torch.equal(*(mc2_hpc.load(folder).encode_text("adam") for folder in (trained_checkpoint, int8_model)))


def test_int8_quantises_every_matrix(trained_checkpoint: Path, int8_model: Path, tmp_path: Path) -> None:
    fp32_bytes = sum(path.stat().st_size for path in trained_checkpoint.glob("model*.safetensors"))
    assert sum(path.stat().st_size for path in int8_model.glob("*.data")) < 0.35 * fp32_bytes
    for path in (int8_model / "image.onnx", int8_model / "text.onnx"):
        graph = onnx.load(path).graph
        floats = [w for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) > 1]
        # Positions and the class token are added, not multiplied.
        assert all(w.dims[-2] <= 24 for w in floats), [(w.name, list(w.dims)) for w in floats]
        assert len({p.stat().st_mode for p in int8_model.iterdir()}) == 1
    with pytest.raises(UserError, match="--int8: quantises ONNX models, not --to hf; leave it out or choose --to onnx"):
        convert(trained_checkpoint, "hf", tmp_path / "hf", int8=True)


def test_evaluation_loads_the_folder(quickstart_model: Path, quickstart_checkpoint: Path, photo: Path) -> None:
    ours, theirs = (mc2_hpc.load(folder, device="cpu") for folder in (quickstart_checkpoint, quickstart_model))
    assert theirs.facts.format == "onnx" and theirs.facts.parameters == ours.facts.parameters
    assert theirs.dual.logits() == pytest.approx(ours.dual.logits())
    with Image.open(photo) as image:
        torch.testing.assert_close(theirs.encode_image([image] * 3), ours.encode_image([image] * 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(theirs.encode_text(TEXTS), ours.encode_text(TEXTS), atol=1e-6, rtol=0)


def test_evaluation_in_half_precision_is_refused(quickstart_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would report scores of another precision than it computed in."""
    assert main(["eval", str(quickstart_model), "--shards", "x.tar", "--precision", "bf16"]) == 2
    assert "an ONNX model computes as it was exported; leave out --precision bf16" in capsys.readouterr().err


def test_bad_folders(quickstart_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(quickstart_model, folder)
    with pytest.raises(UserError, match="an ONNX export cannot be converted; name the model that it was made from"):
        convert(folder, "hf", tmp_path / "out")
    (folder / "image.onnx").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"image.onnx: cannot be loaded as ONNX \(.*\); export the model again"):
        mc2_hpc.load(folder)
    shutil.copy(quickstart_model / "text.onnx", folder / "image.onnx")
    other = r"image.onnx: its input is input_ids: INT64 \(batch, tokens\), not pixel_values: FLOAT \(\*, 3, 32, 32\) as"
    with pytest.raises(UserError, match=other):
        mc2_hpc.load(folder)
    (folder / "image.onnx").unlink()
    os.mkfifo(folder / "image.onnx")
    with pytest.raises(UserError, match=r"image.onnx: is a named pipe; name a file"):
        mc2_hpc.load(folder)
    facts = json.loads((folder / "onnx_model.json").read_text())
    facts["image"]["file"] = "../image.onnx"
    (folder / "onnx_model.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"onnx_model.json: \$.image.file: .*; export the model again"):
        mc2_hpc.load(folder)


def edited(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "image.onnx", load_external_data=False)
    change(model)
    (folder / "image.onnx").write_bytes(model.SerializeToString())


def kept_in(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        weight = next(weight for weight in model.graph.initializer if weight.external_data)
        next(entry for entry in weight.external_data if entry.key == "location").value = name

    return change


def with_constant_in(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        value = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        value.external_data.add(key="location", value=name)
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["constant"], value=value))

    return change


def newer(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = OPSET + 1


def renamed(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "features"


def wider(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 129


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer, f"its operators are of version {OPSET + 1}, not {OPSET} as onnx_model.json says"),
        (renamed, "its output is features: FLOAT (batch, 128), not image_features: FLOAT (*, 128) as"),
        (wider, "its output is image_features: FLOAT (batch, 129), not image_features: FLOAT (*, 128) as"),
        (kept_in("other.data"), "its weights are in other.data, not image.onnx.data"),
        (kept_in("../other.data"), "keeps weights in '../other.data', which is not a file beside it"),
        (kept_in("/etc/passwd"), "keeps weights in '/etc/passwd', which is not a file beside it"),
        (kept_in("below/other.data"), "keeps weights in 'below/other.data', which is not a file beside it"),
        (kept_in("*/_ORT_MEM_ADDR_/*"), "keeps weights in '*/_ORT_MEM_ADDR_/*', which is not a file beside it"),
        (with_constant_in("../other.data"), "keeps weights in '../other.data', which is not a file beside it"),
    ],
)
def test_graphs_that_are_not_as_the_facts_say(
    quickstart_model: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(quickstart_model, folder)
    for other in (folder / "other.data", tmp_path / "other.data"):
        shutil.copyfile(folder / "image.onnx.data", other)
    edited(folder, change)
    with pytest.raises(UserError) as error:
        mc2_hpc.load(folder)
    assert str(error.value).startswith(f"{folder / 'image.onnx'}: {message}")
    assert str(error.value).endswith("; export the model again")


def test_weights_that_are_missing_or_a_pipe(quickstart_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(quickstart_model, folder)
    (folder / "image.onnx.data").unlink()
    with pytest.raises(UserError, match=r"image.onnx.data: no such file"):
        mc2_hpc.load(folder)
    os.mkfifo(folder / "image.onnx.data")
    with pytest.raises(UserError, match=r"image.onnx.data: is a named pipe; name a file"):
        mc2_hpc.load(folder)


def test_a_graph_runs_on_torchs_threads(quickstart_model: Path) -> None:
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            clip = mc2_hpc.load(quickstart_model, "cpu")
        finally:
            torch.set_num_threads(before)
        options = clip.model["text"]._session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)


def test_curation_scores_with_an_export(quickstart_model: Path, photo: Path) -> None:
    """It has no parameters from which to tell the device, and a worker per core: one thread."""
    clip = mc2_hpc.load(quickstart_model, "cpu")
    assert clip.device == torch.device("cpu")
    with Image.open(photo) as opened:
        image = opened.convert("RGB")
    encoder = ClipFeatures(str(quickstart_model), "cpu")
    expected = clip.encode_image(image)
    torch.testing.assert_close(torch.from_numpy(encoder.encode([image]))[0], expected, atol=1e-6, rtol=0)
    assert encoder._clip.model["image"]._session.get_session_options().intra_op_num_threads == 1
    score = ClipScore(model=str(quickstart_model), device="cpu", least=-1)
    pooled = PoolImage("a", "a.png", photo.read_bytes())
    (found,) = score.scores(pa.table({"text": ["a cat"]}), [pooled])
    assert found == pytest.approx(float(expected @ clip.encode_text("a cat")), abs=1e-6)


def test_a_missing_package_is_named(
    quickstart_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript cannot be imported .*: pip install 'mc2_hpc\[onnx\]'"):
        convert(quickstart_checkpoint, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
