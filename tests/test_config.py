"""The config tree: round trips, errors, and the shipped files."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from mc2_hpc.config import RunConfig, config_from_dict, config_to_dict, load_config
from mc2_hpc.data.decode import resolve_backend
from mc2_hpc.errors import UserError
from mc2_hpc.models.presets import resolve
from mc2_hpc.training.step import check_loss, num_micro_batches

SHIPPED = sorted((Path(__file__).parents[1] / "configs" / "train").rglob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\noptim: {lr: 1.0e-3}\nglobal_batch: 512\n", encoding="utf-8")
    return path


def test_file_then_overrides(file):
    config = load_config(file, ["optim.lr=2e-3", "data.crop_scale=[0.5,1.0]", "model.vision.width=64"])
    assert (config.steps, config.optim.lr, config.data.crop_scale) == (7, 2e-3, (0.5, 1.0))
    assert config.model.vision.width == 64 and config.optim.beta2 == 0.95


def test_round_trip(file):
    config = load_config(file, ["model.preset=ViT-H-14-worldwide", "data.balance=x"])
    assert config_from_dict(config_to_dict(config)) == config


def test_read_only(file):
    with pytest.raises(AttributeError):
        load_config(file).steps = 8


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim.lrr=1", ["'optim.lrr'", "'optim.lr'"]),
        ("zero.level=1", ["'zero.level'", "zero.stage"]),
        ("optim.lr=fast", ["optim.lr", "fast"]),
        ("steps=0", ["steps=0", "at least 1"]),
        ("optim.beta1=1", ["optim.beta1=1", "[0, 1)"]),
        ("precision=fp8", ["precision='fp8'", "fp32, bf16"]),
        ("steps", ["key.sub=value"]),
        ("model.vision=3", ["model.vision"]),
    ],
)
def test_errors_name_key_and_cure(file, override, words):
    with pytest.raises(UserError) as error:
        load_config(file, [override])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_complete(path):
    """Each file parses, its model resolves, and its header names source, hardware and command."""
    config = load_config(path)
    resolve(config.model)
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    for word in ("arXiv", "Hardware:", "Command"):
        assert word in header


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_name_the_gpu_path_and_run_without_one(path):
    """Their headers say which overrides a machine without a GPU needs."""
    config = load_config(path)
    assert (config.data.decode, config.loss.backend, config.model.attention) == ("dali", "triton", "sdpa")
    header = path.read_text(encoding="utf-8").partition("\noutput:")[0]
    config = load_config(
        path, re.findall(r"[a-z]+\.[a-z]+=[a-z]+$|[a-z]+\.[a-z]+=[a-z]+(?= )", header.splitlines()[-1])
    )
    assert config.loss.backend == "tiled" and resolve_backend(config.data.decode, "train") == "turbo"
    check_loss(config.loss, torch.device("cpu"))


def test_the_step_of_one_node_is_that_of_the_recipe():
    many, one = (
        load_config(next(p for p in SHIPPED if p.stem == name)) for name in ("vit_h14_worldwide", "vit_h14_8gpu")
    )
    assert num_micro_batches(many, 384) == 1 and num_micro_batches(one, 8) == 48
    same = {"output": one.output, "micro_batch": one.micro_batch, "data": one.data}
    assert dataclasses.replace(many, **same) == one
    assert dataclasses.replace(many.data, lanes=one.data.lanes) == one.data


def test_h14_is_the_recipe():
    config = load_config(next(path for path in SHIPPED if path.stem == "vit_h14_worldwide"))
    assert config.global_batch == 196 * 48 * 8 and config.data.lanes % (48 * 8) == 0
    assert config.steps * config.global_batch == pytest.approx(29.44e9, rel=1e-3)
    arch = resolve(config.model)
    assert arch.quick_gelu and arch.text.vocab_size == 901_629
    defaults = RunConfig()
    assert config.optim == defaults.optim and (defaults.steps, defaults.global_batch) == (391_136, 75_264)


def test_yaml_numbers_are_numbers():
    """YAML 1.1 reads 4e-4 as a string: the shipped files write 4.0e-4."""
    for path in SHIPPED:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8"))["optim"]["lr"], float)
