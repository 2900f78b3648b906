"""Converting folders: the peers give our logits, the way back gives the same bytes, bad input gives one clear line."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mc2_hpc.conversion import huggingface
from mc2_hpc.conversion import open_clip as to_open_clip
from mc2_hpc.conversion.convert import convert
from mc2_hpc.data.normalise import normalise
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.formats import OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG, detect_format
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import load_clip, read_card

Checkpoint = Callable[..., tuple[Path, CLIP]]
STYLES = ["xlmv", "mt5", "gemma"]


def assert_same_model(a: Path, b: Path) -> None:
    assert read_card(a) == read_card(b)
    ours, theirs = TensorFiles(a, "model"), TensorFiles(b, "model")
    assert ours.names() == theirs.names()
    for name in ours.names():
        assert torch.equal(ours.get(name), theirs.get(name)), name
    assert (a / "tokenizer.model").read_bytes() == (b / "tokenizer.model").read_bytes()


def logits(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scale * image @ text.T


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (41, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_open_clip_loads_the_folder(
    style: str, checkpoint: Checkpoint, tmp_path: Path, open_clip: ModuleType, captions: list[str]
) -> None:
    source, model = checkpoint(style, quick_gelu=style == "mt5")
    out = convert(source, "open_clip", tmp_path / "out")
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(captions[:13])
    arch = model.arch
    expected = Tokenizer(source / "tokenizer.model", style, arch.text.context_length).encode(
        captions[:13], pad_to_context=True
    )
    assert torch.equal(tokens, expected)
    images = torch.randn(2, 3, arch.vision.image_size, arch.vision.image_size)
    image, text, scale = model(images, tokens)
    torch.testing.assert_close(
        logits(*theirs.eval()(images, tokens)), logits(image, text, scale.exp()), atol=1e-5, rtol=0
    )
    assert_same_model(convert(out, "mc2", tmp_path / "back"), source)


@torch.no_grad()
def test_open_clip_loads_a_logit_bias(
    checkpoint: Checkpoint, tmp_path: Path, open_clip: ModuleType, captions: list[str]
) -> None:
    source, model = checkpoint(logit_bias=True)
    assert model.logit_bias is not None
    out = convert(source, "open_clip", tmp_path / "out", dtype="bf16")
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    *_, scale, bias = theirs.eval()(
        torch.randn(2, 3, model.arch.vision.image_size, model.arch.vision.image_size),
        open_clip.get_tokenizer(f"local-dir:{out}")(captions[:3]),
    )
    assert torch.equal(scale, model.logit_scale.exp()) and torch.equal(bias, model.logit_bias)
    assert_same_model(convert(convert(source, "open_clip", tmp_path / "fp32"), "mc2", tmp_path / "back"), source)

    with pytest.raises(UserError, match="has a logit_bias, which MetaClip2Model has no place for"):
        convert(source, "hf", tmp_path / "hf")


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_transformers_loads_the_folder(
    style: str, checkpoint: Checkpoint, tmp_path: Path, transformers: ModuleType, captions: list[str]
) -> None:
    source, model = checkpoint(style, quick_gelu=style == "mt5")
    out = convert(source, "hf", tmp_path / "out")
    theirs, report = transformers.MetaClip2Model.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    processor = transformers.AutoProcessor.from_pretrained(out)
    assert type(processor).__name__ == "CLIPProcessor"
    inputs = processor(text=captions, return_tensors="pt", padding=True, truncation=True)
    arch = model.arch
    tokens = Tokenizer(source / "tokenizer.model", style, arch.text.context_length).encode(captions)
    assert torch.equal(inputs["input_ids"], tokens[:, : inputs["input_ids"].shape[1]])
    images = torch.randn(2, 3, arch.vision.image_size, arch.vision.image_size)
    image, text, scale = model(images, tokens)
    found = theirs.eval()(pixel_values=images, **inputs).logits_per_image
    torch.testing.assert_close(found, logits(image, text, scale.exp()), atol=1e-5, rtol=0)
    assert_same_model(convert(out, "mc2", tmp_path / "back"), source)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_images_are_prepared_alike(
    resize: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
    image: Image.Image,
    open_clip: ModuleType,
    transformers: ModuleType,
) -> None:
    source, model = checkpoint(eval_resize=resize)
    side = model.arch.vision.image_size
    _, _, transform = open_clip.create_model_and_transforms(
        f"local-dir:{convert(source, 'open_clip', tmp_path / 'open_clip')}"
    )
    width = side if resize == "squash" else int(side * image.width / image.height)
    left = round((width - side) / 2)
    resized = image.resize((width, side), Image.Resampling.BICUBIC).crop((left, 0, left + side, side))
    expected = normalise(torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(transform(image), expected, atol=1e-5, rtol=0)
    folder = convert(source, "hf", tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    assert found.shape == expected.shape
    # This implementation of bicubic resizing rounds some bytes differently.
    assert (found - expected).abs().max() < 3.5 / 255 / 0.26
    assert read_card(convert(folder, "mc2", tmp_path / "back")).arch.eval_resize == resize


def test_from_one_peer_to_the_other(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, _ = checkpoint()
    there = convert(convert(source, "open_clip", tmp_path / "a"), "hf", tmp_path / "b")
    direct = convert(source, "hf", tmp_path / "c")
    assert {p.name: p.read_bytes() for p in there.iterdir()} == {p.name: p.read_bytes() for p in direct.iterdir()}
    assert_same_model(convert(convert(there, "open_clip", tmp_path / "d"), "mc2", tmp_path / "e"), source)


def test_a_run_folder_is_its_latest_checkpoint(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = checkpoint()
    run = tmp_path / "run"
    shutil.copytree(source, run / "checkpoints" / "step-7")
    (run / "checkpoints" / "latest").write_text("step-7\n")
    (run / "config.json").write_text("{}")  # not transformers'
    caplog.set_level(logging.INFO)
    out = convert(str(run), "open_clip", str(tmp_path / "deep" / "out"))
    assert f"converted {run} (mc2) to {out} (open_clip)" in caplog.text
    assert detect_format(out) == "open_clip"
    assert out.stat().st_mode & 0o777 == (tmp_path / "run").stat().st_mode & 0o777


def test_custom_text_models_of_open_clip(checkpoint: Checkpoint, tmp_path: Path, open_clip: ModuleType) -> None:
    source, _ = checkpoint()
    out = convert(source, "open_clip", tmp_path / "out")
    config = json.loads((out / "open_clip_config.json").read_text())
    twin = open_clip.CustomTextCLIP(**config["model_cfg"])
    text = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
    state = load_file(out / "open_clip_model.safetensors")
    state = {f"text.{name}" if name.startswith(text) else name: tensor for name, tensor in state.items()}
    twin.load_state_dict(state)
    save_file(state, out / "open_clip_model.safetensors")
    config["model_cfg"]["custom_text"] = True
    (out / "open_clip_config.json").write_text(json.dumps(config))
    assert_same_model(convert(out, "mc2", tmp_path / "back"), source)


def test_half_precision_widens_exactly_and_old_buffers_are_left(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, _ = checkpoint()
    out = convert(source, "hf", tmp_path / "out")
    path = out / "model.safetensors"
    state = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    half = dict(list(state.items())[:40])
    rest = dict(list(state.items())[40:])
    path.unlink()
    save_file(half, out / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(rest, out / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    weight_map = {name: "model-00001-of-00002.safetensors" for name in half}
    weight_map |= {name: "model-00002-of-00002.safetensors" for name in rest}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    back, ours = TensorFiles(convert(out, "mc2", tmp_path / "back"), "model"), TensorFiles(source, "model")
    assert back.names() == ours.names()
    for name in ours.names():
        assert back.get(name).dtype == torch.float32
        assert torch.equal(back.get(name), ours.get(name).bfloat16().float())


def test_an_imported_model_is_one_of_ours(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, model = checkpoint()
    imported, card = load_clip(convert(convert(source, "hf", tmp_path / "a"), "mc2", tmp_path / "b"))
    assert card == read_card(source)
    assert all(torch.equal(a, b) for a, b in zip(imported.parameters(), model.parameters(), strict=True))


# Bad input.


def fails(message: str, source: Path, to: str, out: Path, image_size: int | None = None) -> None:
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    with pytest.raises(UserError, match=message) as error:
        convert(source, to, out, image_size=image_size)
    assert "\n" not in str(error.value)
    assert not out.exists() or out in before
    if out.parent.is_dir():
        assert sorted(out.parent.iterdir()) == before  # nothing half-written


def test_unknown_formats_and_places(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, _ = checkpoint()
    out = tmp_path / "out" / "x"
    fails(r"^--to 'pth': choose one of open_clip, hf, mc2, onnx$", source, "pth", out)
    fails(r"is already in the format mc2", source, "mc2", out)
    fails(r"nowhere: no such folder$", tmp_path / "nowhere", "hf", out)
    (tmp_path / "empty").mkdir()
    fails(r"empty: no model there \(looked for model.json", tmp_path / "empty", "hf", out)
    fails(r"tokenizer.model: is a file; name the folder", source / "tokenizer.model", "hf", out)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"used: exists and is not an empty folder; choose another --out"):
        convert(source, "hf", tmp_path / "used")
    assert (tmp_path / "used" / "mine.txt").read_text() == "keep"
    (tmp_path / "free").mkdir()
    assert (convert(source, "hf", tmp_path / "free") / "config.json").is_file()


@pytest.mark.parametrize("to", ["mc2", "open_clip", "hf"])
@torch.no_grad()
def test_another_image_size(
    to: str, checkpoint: Checkpoint, tmp_path: Path, open_clip: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """From every format into every format, as open_clip resizes its own."""
    source, _ = checkpoint()
    exported = convert(source, "open_clip", tmp_path / "exported")
    theirs = open_clip.create_model(f"local-dir:{exported}", force_image_size=56).eval()
    images = torch.randn(2, 3, 56, 56)
    with caplog.at_level(logging.INFO):
        for kind, folder in (("mc2", source), ("open_clip", exported)):
            out = convert(folder, to, tmp_path / kind, image_size=56)
            back = out if to == "mc2" else convert(out, "mc2", tmp_path / f"{kind}_back")
            model, card = load_clip(back)
            assert card.arch.vision.image_size == 56 and not (out / "scratch").exists()
            torch.testing.assert_close(model.encode_image(images), theirs.encode_image(images), atol=1e-5, rtol=0)
    assert caplog.text.count("image positions: 32 px (4 x 4 patches) to 56 px (7 x 7)") == 2
    fails(
        "image_size=60 is not a multiple of patch_size=8: choose 56 or 64", source, to, tmp_path / "no", image_size=60
    )


SAVED = {
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "hf": ("model.safetensors", "pytorch_model.bin"),
}
"""The file of the weights in an exported folder, and the library's name for one of torch.save."""


@pytest.mark.parametrize("to", SAVED)
def test_weights_of_torch_save(to: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Under the library's name, under any name, as a training checkpoint, of a wrapped model, in several files."""
    source, _ = checkpoint()
    folder = convert(source, to, tmp_path / to)
    name, saved = SAVED[to]
    weights = load_file(folder / name)
    (folder / name).unlink()
    with_module = {f"module.{key}": tensor for key, tensor in weights.items()}
    for number, (file, content) in enumerate(
        {saved: weights, "a.pt": {"epoch": 1, "state_dict": with_module, "optimizer": {"step": 3}}}.items()
    ):
        torch.save(content, folder / file)
        assert_same_model(convert(folder, "mc2", tmp_path / f"back_{number}"), source)
        (folder / file).unlink()
    names = sorted(weights)
    for part in range(2):
        path = folder / f"pytorch_model-0000{part + 1}-of-00002.bin"
        torch.save({name: weights[name] for name in names[part::2]}, path)
    if to == "hf":
        assert_same_model(convert(folder, "mc2", tmp_path / "parts"), source)
    else:
        fails("pytorch_model-00001-of-00002.bin or pytorch_model-00002-of-00002.bin", folder, "mc2", tmp_path / "out")


@pytest.mark.parametrize("to", SAVED)
def test_weights_that_need_code_are_refused(to: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, _ = checkpoint()
    out = tmp_path / "sub" / "out"
    folder = convert(source, to, tmp_path / to)
    name, saved = SAVED[to]
    (folder / name).unlink()
    torch.save(torch.nn.Linear(2, 2), folder / saved)
    fails(f"{saved}: not read: it needs torch.nn.modules.linear.Linear, which would run code", folder, "mc2", out)
    fails(f"{saved}: is a file; name the folder that holds the model", folder / saved, "mc2", out)
    (folder / saved).unlink()
    fails(r"no weights there \(looked for ", folder, "mc2", out)


@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_weights_that_do_not_fit(to: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, _ = checkpoint()
    folder = convert(source, to, tmp_path / to)
    out = tmp_path / "sub" / "out"
    path = next(folder.glob("*model.safetensors"))
    state = load_file(path)
    save_file({name: tensor for name, tensor in state.items() if name != "logit_scale"}, path)
    fails(r"checkpoint of another model: it lacks 'logit_scale' \(1 missing, 0 unexpected\)", folder, "mc2", out)
    save_file({**state, "logit_bias": torch.zeros(1)}, path)
    fails(r"checkpoint of another model: it has 'logit_bias' \(0 missing, 1 unexpected\)", folder, "mc2", out)
    save_file({**state, "logit_scale": torch.zeros(2)}, path)
    fails(r"logit_scale is \(2,\), the config needs \(\)", folder, "mc2", out)
    save_file({**state, "logit_scale": torch.zeros((), dtype=torch.int64)}, path)
    fails(r"logit_scale is torch.int64; convert weights of fp32, fp16 or bf16", folder, "mc2", out)
    path.write_bytes(path.read_bytes()[:1000])
    fails(r"damaged safetensors file", folder, "mc2", out)


def test_our_own_folder_can_be_wrong_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, _ = checkpoint()
    out = tmp_path / "sub" / "out"
    (source / "tokenizer.model").rename(tmp_path / "t")
    fails(r"no tokenizer.model beside the weights; copy the run's sentencepiece model there", source, "hf", out)
    (tmp_path / "t").rename(source / "tokenizer.model")
    card = json.loads((source / "model.json").read_text())
    (source / "model.json").write_text(json.dumps({**card, "tokenizer_style": "mt5"}))
    fails(r"special ids are .* it fits style xlmv", source, "open_clip", out)
    card["arch"]["embed_dim"] += 1
    (source / "model.json").write_text(json.dumps(card))
    fails(r"checkpoint of another model: vision.projection is", source, "hf", out)


CONFIG_FAULTS = [
    ("open_clip", "model_cfg", "embed_dim", None, r" embed_dim=None: must be a whole number of at least 1"),
    ("open_clip", "model_cfg", "init_logit_bias", "ten", r"model_cfg.init_logit_bias='ten': must be a number or null"),
    ("open_clip", "model_cfg", "vision_cfg", 3, r"vision_cfg is missing; not an open_clip config"),
    ("open_clip", "vision_cfg", "timm_model_name", "vit", r"timm_model_name='vit': not a model of the worldwide"),
    ("open_clip", "vision_cfg", "layers", [3, 4, 6, 3], r"vision_cfg.layers=\[3, 4, 6, 3\]: must be a whole number"),
    ("open_clip", "vision_cfg", "mlp_ratio", "4", r"vision_cfg.mlp_ratio='4': must be a positive number"),
    ("open_clip", "vision_cfg", "pool_type", "avg", r"vision_cfg.pool_type='avg': not a model of the worldwide"),
    ("open_clip", "vision_cfg", "head_width", 0, r"vision_cfg.head_width=0: must be a whole number of at least 1"),
    ("open_clip", "vision_cfg", "patch_size", 5, r"image_size=32 is not a multiple of patch_size=5"),
    ("open_clip", "text_cfg", "pool_type", "argmax", r"text_cfg.pool_type='argmax': not a model of the worldwide"),
    ("open_clip", "text_cfg", "no_causal_mask", True, r"text_cfg.no_causal_mask=True: not a model of the worldwide"),
    ("open_clip", "text_cfg", "width", 32, r"checkpoint of another model: "),
    ("open_clip", "preprocess_cfg", "mean", [0.5, 0.5, 0.5], r"cfg.mean=\[0.5, 0.5, 0.5\]: models here use"),
    ("open_clip", "preprocess_cfg", "resize_mode", "longest", r"resize_mode='longest': models here use shortest or"),
    ("hf", "", "model_type", "clip", r"model_type is 'clip'; only metaclip_2 models can be imported"),
    ("hf", "", "projection_dim", True, r"projection_dim=True: must be a whole number"),
    ("hf", "vision_config", "image_size", [32, 32], r"vision_config.image_size=\[32, 32\]: must be a whole number"),
    ("hf", "vision_config", "hidden_act", "quick_gelu", r"hidden_act='quick_gelu': models here have 'gelu'"),
    ("hf", "vision_config", "layer_norm_eps", 1e-6, r"vision_config.layer_norm_eps=1e-06: models here have 1e-05"),
    ("hf", "vision_config", "num_attention_heads", 5, r"vision_config.hidden_size is not a multiple of num_attention"),
    ("hf", "text_config", "hidden_act", "relu", r"hidden_act='relu': models here have quick_gelu or gelu"),
    ("hf", "text_config", "intermediate_size", 99, r"text_config.intermediate_size=99: models here have 256"),
    ("hf", "text_config", "eos_token_id", 1, r"EOS id 2 and \d+ ids do not fit the model \(EOS id 1, "),
]  # fmt: skip


@pytest.mark.parametrize(("to", "section", "key", "value", "message"), CONFIG_FAULTS)
def test_configs_of_other_models(
    to: str, section: str, key: str, value: object, message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, _ = checkpoint()
    folder = convert(source, to, tmp_path / to)
    path = folder / (OPEN_CLIP_CONFIG if to == "open_clip" else TRANSFORMERS_CONFIG)
    config = json.loads(path.read_text())
    place = config["model_cfg"] if section in ("vision_cfg", "text_cfg") else config
    (place[section] if section else place)[key] = value
    path.write_text(json.dumps(config))
    fails(message, folder, "mc2", tmp_path / "sub" / "out")


def test_invalid_configs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, _ = checkpoint()
    folder = convert(source, "open_clip", tmp_path / "a")
    out = tmp_path / "sub" / "out"
    (folder / "open_clip_config.json").write_text("[]")
    fails(r"no model_cfg there; not an open_clip config", folder, "mc2", out)
    (folder / "open_clip_config.json").write_text("{")
    fails(r"open_clip_config.json: not valid JSON", folder, "mc2", out)
    folder = convert(source, "hf", tmp_path / "b")
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**preprocessor, "image_std": [0.5, 0.5, 0.5]}))
    fails(r"image_std=\[0.5, 0.5, 0.5\]: models here use", folder, "mc2", out)


def test_what_transformers_5_says_of_images_is_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It saves the image processor only in ``processor_config.json``."""
    source, _ = checkpoint(eval_resize="squash")
    folder = convert(source, "hf", tmp_path / "a")
    images = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"processor_class": "CLIPProcessor", "image_processor": images}))
    back = convert(folder, "mc2", tmp_path / "b")
    assert json.loads((back / "model.json").read_text())["arch"]["eval_resize"] == "squash"
    out = tmp_path / "sub" / "out"
    path.write_text(json.dumps({"image_processor": {**images, "image_mean": [0.5, 0.5, 0.5]}}))
    fails(r"image_mean=\[0.5, 0.5, 0.5\]: models here use", folder, "mc2", out)
    for wrong in ({"image_processor": "CLIPImageProcessor"}, ["image_processor"]):
        path.write_text(json.dumps(wrong))
        fails(r"processor_config.json: not an image processor's description", folder, "mc2", out)
    path.write_text(json.dumps({"processor_class": "CLIPProcessor"}))  # transformers 4 writes both files
    (folder / "preprocessor_config.json").write_text(json.dumps({**images, "image_std": [1, 1, 1]}))
    fails(r"image_std=\[1.0, 1.0, 1.0\]: models here use", folder, "mc2", out)


def test_an_interrupted_conversion_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = checkpoint()

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_tensors", full_disk)
    parent = tmp_path / "sub"
    with pytest.raises(OSError, match="No space left"):
        convert(source, "hf", parent / "out")
    assert list(parent.iterdir()) == []


# Details of the configs.


@pytest.mark.parametrize("width", [1, 3, 48, 384, 1000, 1280, 1664])
def test_mlp_ratio_gives_the_width_back(width: int) -> None:
    for mlp_width in [*range(1, 300), *range(4 * width, 5 * width, 7), 8192]:
        assert int(width * to_open_clip.mlp_ratio(width, mlp_width)) == mlp_width
    assert to_open_clip.mlp_ratio(1664, 8192) == 4.9231
    assert to_open_clip.mlp_ratio(1280, 5120) == 4.0


def test_defaults_are_transformers_own(transformers: ModuleType) -> None:
    text, vision = transformers.MetaClip2TextConfig(), transformers.MetaClip2VisionConfig()
    for key, value in huggingface.TEXT_DEFAULTS.items():
        assert getattr(text, key) == value, key
    for key, value in huggingface.VISION_DEFAULTS.items():
        assert getattr(vision, key) == value, key
    assert transformers.MetaClip2Config().projection_dim == huggingface.PROJECTION_DIM_DEFAULT


def test_a_config_that_transformers_wrote(
    tiny_arch: ClipArchitecture, transformers: ModuleType, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    """It omits values that equal the defaults."""
    source, _ = checkpoint()
    out = convert(source, "hf", tmp_path / "out")
    transformers.MetaClip2Model.from_pretrained(out).save_pretrained(out)
    transformers.CLIPImageProcessor.from_pretrained(out).save_pretrained(out)
    assert_same_model(convert(out, "mc2", tmp_path / "back"), source)


def test_defaults_are_open_clips_own(open_clip: ModuleType) -> None:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    for config, ours in ((CLIPTextCfg(), to_open_clip._TEXT), (CLIPVisionCfg(), to_open_clip._VISION)):
        assert {key: getattr(config, key) for key in ours} == ours
