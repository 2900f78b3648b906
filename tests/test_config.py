"""The config tree: round trips, errors, and the shipped files."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from mc2_hpc.config import DistillConfig, RunConfig, config_from_dict, config_to_dict, load_config
from mc2_hpc.conversion.open_clip import config as open_clip_config
from mc2_hpc.data.decode import resolve_backend
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.presets import PRESETS, num_parameters, resolve
from mc2_hpc.models.weights import ModelCard
from mc2_hpc.training.step import check_loss, num_micro_batches

SHIPPED = sorted((Path(__file__).parents[1] / "configs" / "train").rglob("*.yaml"))
OPEN_CLIPS = {
    "vit_h14_worldwide": "ViT-H-14-worldwide-quickgelu",
    "vit_h14_worldwide_378": "ViT-H-14-worldwide-378",
    "vit_bigg14_worldwide": "ViT-bigG-14-worldwide",
    "vit_bigg14_worldwide_378": "ViT-bigG-14-worldwide-378",
}
"""Shipped files whose architecture open_clip has, by its name there."""


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


def test_a_tilde_is_the_home_folder_in_every_path(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    data = ("data.tokenizer", "data.balance", "data.cache_dir", "data.takedown")
    keys = ("output", "model.init_from", *data, "eval.suite", "eval.root")
    for more in ("data.features", "distill.teacher"):  # which do not go together
        overrides = ["freeze.vision=all", *(f"{key}=~/x" for key in (*keys, more))]
        config = config_to_dict(load_config(file, overrides))
        for key in (*keys, more):
            section, _, name = key.rpartition(".")
            assert (config[section] if section else config)[name] == "/home/ann/x", key
    assert load_config(file, ["output=runs/~x"]).output == "runs/~x"


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
        ("precision=fp16", ["precision='fp16'", "fp32, bf16, fp8"]),
        ("model.recompute=some", ["model.recompute='some'", "none, selective, full"]),
        ("model.activation_checkpointing=true", ["is now 'model.recompute'", "full for true, none for false"]),
        ("model.embedding=row", ["model.embedding='row'", "sharded, dense"]),
        ("steps", ["key.sub=value"]),
        ("model.vision=3", ["model.vision"]),
        ("model.init_from= ", ["model.init_from", "empty"]),
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
    (line,) = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# Needs a GPU")]
    config = load_config(path, re.findall(r"[a-z]+\.[a-z]+=[a-z]+", line))
    assert config.loss.backend == "tiled" and resolve_backend(config.data.decode, "train") == "turbo"
    check_loss(config.loss, torch.device("cpu"))


def test_the_step_of_one_node_is_that_of_the_recipe():
    names = ("vit_h14_worldwide", "vit_h14_8gpu")
    many, one = (load_config(next(path for path in SHIPPED if path.stem == name)) for name in names)
    assert num_micro_batches(many, 384) == 1 and num_micro_batches(one, 8) == 48
    same = {"output": one.output, "micro_batch": one.micro_batch, "data": one.data}
    assert dataclasses.replace(many, **same) == one
    assert dataclasses.replace(many.data, lanes=one.data.lanes) == one.data


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_models_have_open_clips_sizes(path, open_clip):
    """Built on the meta device, and by open_clip from its own config or, where it has none, from the exported one."""
    arch = resolve(load_config(path).model)
    card = ModelCard(arch=arch, tokenizer_style="xlmv")
    known = OPEN_CLIPS.get(path.stem)
    theirs = open_clip.get_model_config(known) if known else open_clip_config(card)["model_cfg"]
    with torch.device("meta"):
        models = [CLIP(arch), open_clip.model.CLIP(**{k: v for k, v in theirs.items() if k != "custom_text"})]
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert counts == [num_parameters(arch)] * 2


def test_every_size_and_resolution_has_a_file():
    archs = [resolve(load_config(path).model) for path in SHIPPED]
    sizes = {(arch.vision.patch_size, arch.vision.width, arch.vision.image_size) for arch in archs}
    assert sizes == {(a.vision.patch_size, a.vision.width, a.vision.image_size) for a in PRESETS.values()}
    assert {arch.text.vocab_size for arch in archs} == {901_629, 250_000}


def test_high_resolution_stages_start_from_a_shipped_run():
    """Only the image size, and what is said to be ours, differs from the run at 224 px."""
    runs = {config.output: config for config in map(load_config, SHIPPED)}
    stages = [config for config in runs.values() if config.model.init_from is not None]
    assert len(stages) == 8
    for stage in stages:
        first = runs[stage.model.init_from]
        old, new = resolve(first.model), resolve(stage.model)
        small = dataclasses.replace(new.vision, image_size=old.vision.image_size)
        assert dataclasses.replace(new, vision=small, eval_resize=old.eval_resize) == old
        assert stage.optim == dataclasses.replace(first.optim, lr=stage.optim.lr, warmup=500)
        assert stage.optim.lr == pytest.approx(first.optim.lr / 10) and stage.global_batch == first.global_batch
        assert stage.steps * stage.global_batch == pytest.approx(1e9, rel=0.01)


@pytest.mark.parametrize("size", ["l14", "b16", "s16"])
def test_distilled_students_are_shipped_runs_with_a_teacher(size):
    runs = {path.stem: load_config(path) for path in SHIPPED}
    student, alone = runs[f"distill_{size}_from_h14"], runs[f"vit_{size}_worldwide"]
    assert dataclasses.replace(student, output=alone.output, distill=None) == alone
    assert student.distill is not None and (student.distill.weight, student.distill.scale) == (1.0, 200.0)
    teacher = runs["vit_h14_worldwide"]
    assert student.distill.teacher == teacher.output
    # So it sees the student's own images and token ids.
    assert resolve(student.model).vision.image_size == resolve(teacher.model).vision.image_size
    assert student.data.tokenizer == teacher.data.tokenizer


def test_the_mix_is_the_b32_run_on_other_data():
    runs = {path.stem: load_config(path) for path in SHIPPED}
    mix, alone = runs["vit_b32_worldwide_mix"], runs["vit_b32_worldwide"]
    same = {name: getattr(alone.data, name) for name in ("train", "balance", "takedown")}
    assert dataclasses.replace(mix, output=alone.output, data=dataclasses.replace(mix.data, **same)) == alone


def test_fused_kernels_are_named_where_the_model_can_use_them():
    for path in SHIPPED:
        config = load_config(path)
        quick_gelu = resolve(config.model).quick_gelu
        assert (config.model.norm, config.model.activation) == ("triton", "triton" if quick_gelu else "auto"), path.name
        without = "model.norm=torch" + " model.activation=torch" * quick_gelu
        assert f"data.decode=turbo loss.backend=tiled {without}\n" in path.read_text(encoding="utf-8"), path.name


def test_b32_is_metaclips():
    """Its betas and weight decay are those of MetaCLIP, not of the released H/14."""
    optim = load_config(next(path for path in SHIPPED if path.stem == "vit_b32_worldwide")).optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (5e-4, 0.9, 0.98, 1e-6, 0.2)


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


def test_a_section_that_may_be_missing_can_be_set_part_by_part_and_removed(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("distill: {teacher: runs/h14, weight: 2}\n", encoding="utf-8")
    assert load_config(path).distill == DistillConfig(teacher="runs/h14", weight=2.0)
    assert load_config(path, ["distill.scale=100"]).distill == DistillConfig(teacher="runs/h14", weight=2, scale=100)
    assert load_config(path, ["distill=null"]).distill is None
    path.write_text("steps: 3\n", encoding="utf-8")
    assert load_config(path).distill is None
    assert load_config(path, ["distill.teacher=a"]).distill == DistillConfig(teacher="a")
    with pytest.raises(UserError, match="data: is a section of keys"):
        load_config(path, ["data=null"])


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["lora.rank=0"], "lora.rank=0: must be at least 1"),
        (["lora.alpha=0"], "lora.alpha=0.0: must be positive"),
        (["lora={vision: false, text: false}"], "leaves no tower to adapt; leave out the section lora"),
        (["lora={}", "freeze.text=1"], "lora.text=true and freeze.text=1: an adapted tower is frozen except for"),
        (["lora={}", "freeze.vision=all", "data.features=/f"], "lora.vision=true and freeze.vision=all"),
        (["lora={}", "model.new_tokenizer=true"], "the token table would stay that of another tokenizer"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused(file, overrides, words):
    with pytest.raises(UserError) as error:
        load_config(file, overrides)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert load_config(file, ["lora={vision: false}", "freeze.vision=all", "data.features=/f"]).lora is not None


def test_a_teacher_needs_images_and_not_their_features(file):
    overrides = ["freeze.vision=all", "data.features=/f", "distill.teacher=/t"]
    with pytest.raises(UserError, match="data.features and distill.teacher: a teacher needs the images"):
        load_config(file, overrides)
    assert load_config(file, [*overrides[:2], "distill.features=/g"]).distill == DistillConfig(features="/g")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["distill.features=/f", "distill.teacher=/t"], "distill.teacher and distill.features: .*; set only one"),
        (["distill.weight=2"], "distill.teacher: is not set"),
        (
            ["distill.features=/f", "stages=[{steps: 7, data: {crop_scale: [0.5, 1]}}]"],
            "crop_scale and distill.features",
        ),
    ],
)
def test_features_of_a_teacher_that_do_not_go_with_the_rest_are_refused(file, overrides, words):
    with pytest.raises(UserError, match=words) as error:
        load_config(file, overrides)
    assert "\n" not in str(error.value)
