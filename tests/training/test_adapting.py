"""The commands of docs/adapting.md, as they are written there, on a small model and a small suite."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import mc2_hpc
from mc2_hpc.config import load_config
from mc2_hpc.conversion.convert import convert
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import resolve
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, load_clip, write_card, write_tensors
from tests.faults.tiny_run import write_config

PAGE = Path(__file__).parents[2] / "docs" / "adapting.md"


def commands():
    """The page's first block, one list of words for each line."""
    block = PAGE.read_text(encoding="utf-8").split("\n\n    ")[1].partition("\n\n")[0]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.fixture
def released(tiny_pool, tmp_path):
    """A transformers folder of a model of 28 px, with weights of torch.save and only a tokenizer.json."""
    arch = resolve(load_config(write_config(tmp_path / "old.yaml", tiny_pool)).model)
    arch = dataclasses.replace(
        arch, quick_gelu=True, vision=dataclasses.replace(arch.vision, image_size=28, patch_size=14)
    )
    ours = tmp_path / "ours"
    write_tensors(ours / "model.0.safetensors", build_clip(arch, seed=1).state_dict())
    write_card(ours, ModelCard(arch=arch, tokenizer_style="xlmv"))
    (ours / TOKENIZER_FILE).write_bytes(tiny_pool.tokenizer.read_bytes())
    folder = convert(ours, "hf", tmp_path / "released")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "sentencepiece.bpe.model").unlink()
    return folder


def write_suite(folder):
    """A suite of six images in two classes."""
    for number in range(6):
        place = folder / "images" / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    sets = {"pets": {"reader": "class_folders", "path": "images"}}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"root": str(folder), "sets": sets}))


def test_the_commands(released, tiny_pool, tmp_path, fork_server, open_clip):
    page = yaml.safe_load(PAGE.read_text(encoding="utf-8").split("```yaml\n")[1].partition("```")[0])
    small = {"steps": 2, "global_batch": 8, "precision": "fp32"}
    data = {"train": str(tiny_pool.shards), "lanes": 8, "workers": 0}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump({**page, **small, "data": data}))
    write_suite(tmp_path)
    logs = []
    for command in commands():
        assert command[0] == "mc2"
        result = fork_server.run([sys.executable, "-m", "mc2_hpc.cli", *command[1:]], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        logs.append(result.stderr)
    assert "image positions: 28 px (2 x 2 patches) to 378 px (27 x 27)" in logs[0]
    assert "step-00000002 after step 2" in logs[1] and "image positions" not in logs[1]
    tuned, card = load_clip(tmp_path / "runs/tuned")
    assert card.arch.vision.image_size == 378 and card.arch.quick_gelu
    size = json.loads((tmp_path / "tuned-hf/config.json").read_text())["vision_config"]["image_size"]
    merged, _ = load_clip(tmp_path / "merged")
    before, _ = load_clip(tmp_path / "before")
    for name, tensor in merged.state_dict().items():
        halves = 0.5 * tuned.state_dict()[name] + 0.5 * before.state_dict()[name]
        assert torch.equal(tensor, halves), name
    assert json.loads((tmp_path / "sweep/sweep.json").read_text())["alphas"] == [round(0.1 * n, 1) for n in range(11)]
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'tuned-open-clip'}").eval()
    images = torch.randn(1, 3, 378, 378)
    with torch.no_grad():
        expected = merged.encode_image(images)
        torch.testing.assert_close(theirs.encode_image(images), expected, atol=1e-5, rtol=0)
    assert size == 378
    texts = ["a red house", "ein rotes Haus"]
    whole = mc2_hpc.load(tmp_path / "merged", device="cpu").encode_text(texts)
    for folder in ("tuned-hf", "tuned-onnx"):
        found = mc2_hpc.load(tmp_path / folder, device="cpu").encode_text(texts)
        assert torch.nn.functional.cosine_similarity(found, whole).min() > 0.99
    card = (tmp_path / "tuned-hf/README.md").read_text()
    assert "| merged | 0.5 x tuned, step 4 |\n| merged | 0.5 x before |" in card


def test_a_runs_card_tells_its_data(tiny_pool, tmp_path, fork_server):
    """The hashes are those that training recorded."""
    config = write_config(tmp_path / "run.yaml", tiny_pool, output=str(tmp_path / "run"), steps=2)
    result = fork_server.run([sys.executable, "-m", "mc2_hpc.cli", "train", str(config)])
    assert result.returncode == 0, result.stderr
    card = (convert(tmp_path / "run", "hf", tmp_path / "hf") / "README.md").read_text()
    (trainer,) = (tmp_path / "run/checkpoints").glob("step-*/trainer.json")
    shards = json.loads(trainer.read_text())["shards"]
    assert f"| data | {shards['count']:,} shards, SHA-256 of their names {shards['sha256']} |" in card
    assert "| steps | 2 |" in card and str(tmp_path) not in card
