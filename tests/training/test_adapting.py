"""The commands of docs/adapting.md, as they are written there, on a small model."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

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


def test_the_commands(released, tiny_pool, tmp_path, fork_server, open_clip):
    page = yaml.safe_load(PAGE.read_text(encoding="utf-8").split("```yaml\n")[1].partition("```")[0])
    small = {"steps": 2, "global_batch": 8, "precision": "fp32"}
    data = {"train": str(tiny_pool.shards), "lanes": 8, "workers": 0}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump({**page, **small, "data": data}))
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
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'tuned-open-clip'}").eval()
    images = torch.randn(1, 3, 378, 378)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_image(images), tuned.encode_image(images), atol=1e-5, rtol=0)
    assert size == 378
