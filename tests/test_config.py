"""The config tree: round trips, errors, and the shipped files."""

from pathlib import Path

import pytest
import yaml

from mc2_hpc.config import RunConfig, config_from_dict, config_to_dict, load_config
from mc2_hpc.errors import UserError
from mc2_hpc.models.presets import resolve

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
        ("model.embedding=row", ["model.embedding='row'", "sharded, dense"]),
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
