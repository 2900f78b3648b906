"""``mc2 plan`` from the command line, on a tiny model."""

import json
import sys
from pathlib import Path

import pytest

from mc2_hpc.cli import main
from mc2_hpc.config import config_to_dict, load_config, yaml_text
from mc2_hpc.config_stages import run_stages
from mc2_hpc.errors import UserError
from mc2_hpc.models.presets import PRESETS, num_parameters
from mc2_hpc.planning.plan import check_planned, planned_architecture, planned_teacher
from tests.planning.real_step import tiny_config

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted([*CONFIGS.glob("train/*.yaml"), *CONFIGS.glob("ablations/base/*.yaml")])


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml_text(config_to_dict(tiny_config(world_size=16, precision="bf16"))))
    return path


def test_a_plan_with_advice(config_file, tmp_path, fork_server):
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    words = ["--gpus", "16", "--caption-tokens", "8", "--price", "2", "--advise", "--json", out, "--html", page]
    done = fork_server.run([sys.executable, "-m", "mc2_hpc.cli", "plan", config_file, *words])
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    (first,) = found["plans"]
    assert first["gpus"] == 16 and first["counted"]["world_size"] == 16
    assert 0 < first["predicted"]["step_seconds"] < 1 and first["predicted"]["money"] > 0
    assert first["predicted"]["pairs_that_fit"] > 8
    assert f"{first['predicted']['pairs_per_second']:,.0f}" in page.read_text(encoding="utf-8")
    assert "predicted, on h100 and ndr" in done.stdout and "what to change" in done.stdout
    sources = ("peaks", "fractions", "network ")
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.startswith(sources))


def planned(fork_server, path, tmp_path, *words):
    """What is printed, and the values of ``--json``, of a plan for 16 GPUs."""
    out = tmp_path / "plan.json"
    words = ["--gpus", "16", "--caption-tokens", "8", "--json", out, *words]
    done = fork_server.run([sys.executable, "-m", "mc2_hpc.cli", "plan", path, *words])
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def write(path, **values):
    path.write_text(yaml_text(config_to_dict(tiny_config(world_size=16, precision="bf16", **values))))
    return path


def test_a_run_with_a_teacher_that_does_not_exist_yet(tmp_path, fork_server, capsys):
    path = write(tmp_path / "taught.yaml", distill={"teacher": "runs/later"})
    assert main(["plan", str(path), "--gpus", "16"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "distill.teacher=runs/later: no run or checkpoint is there" in line
    said, found = planned(fork_server, path, tmp_path, line.rpartition(" ")[2])
    (plan,) = found["plans"]
    arch = PRESETS["ViT-H-14-worldwide"]
    assert plan["counted"]["before"]["teacher"] == pytest.approx(4 * num_parameters(arch), rel=0.01)
    assert found["total"] is None and "  teacher " in said


STAGES = [
    {"steps": 100, "model": {"vision": {"image_size": 32}}},
    {"samples": 1000, "global_batch": 64, "model": {"vision": {"image_size": 64}}},
]


def test_a_run_with_stages(tmp_path, fork_server):
    path, page = write(tmp_path / "stages.yaml", stages=STAGES), tmp_path / "plan.html"
    said, found = planned(fork_server, path, tmp_path, "--price", "2", "--html", page)
    first, second = found["plans"]
    assert [(each["stage"], each["steps"], each["counted"]["pairs"]) for each in (first, second)] == [
        (1, 100, 8),
        (2, 16, 4),
    ]
    patches = [
        each["counted"]["work"]["forward/attention"]["flops"] / each["counted"]["pairs"] for each in (first, second)
    ]
    assert patches[1] > 2 * patches[0]  # four times the patches, and the same captions
    for key in ("gpu_hours", "money"):
        assert found["total"][key] == pytest.approx(first["predicted"][key] + second["predicted"][key])
    assert found["total"]["money"] == pytest.approx(2 * found["total"]["gpu_hours"])
    assert found["total"]["days"] == pytest.approx(found["total"]["gpu_hours"] / 24 / 16)
    assert "stage 1: 100 steps         stage 2: 16 steps" in said and "all stages, predicted: " in said
    assert f"{path}, stage 2 of 2" in page.read_text(encoding="utf-8")
    assert "All stages" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [["--advise"], ["--compare"]])
def test_stages_are_planned_alone(config_file, tmp_path, capsys, words):
    staged = str(write(tmp_path / "stages.yaml", stages=STAGES))
    files = [staged] if words == ["--advise"] else [str(config_file), staged]
    arguments = [*files, *words] if words == ["--advise"] else [*words, *files]
    assert main(["plan", *arguments, "--gpus", "16"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{staged}: has stages" in line


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_can_be_planned(path):
    """Each step of it, on a node and on two."""
    from mc2_hpc.training.step import num_micro_batches

    config = load_config(path)
    if config.distill is not None:
        with pytest.raises(UserError, match="distill.teacher=ViT-H-14-worldwide$"):
            check_planned(config)
        config = load_config(path, ["distill.teacher=ViT-H-14-worldwide"])
        assert planned_teacher(config) == PRESETS["ViT-H-14-worldwide"]
    for stage in run_stages(config):
        check_planned(stage.config)
        assert num_parameters(planned_architecture(stage.config)) > 0
        for gpus in (8, 16):
            assert num_micro_batches(stage.config, gpus) >= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu", "h900"], "--gpu h900: choose one of a100"),
        (["--gpus", "12"], "--gpus 12 is not a multiple of --per-node 8"),
        (["--gpus", "24"], "24 ranks but data.lanes=16"),
        (["--gpus", "many"], "must be a whole number"),
        (["--compare", "a.yaml", "b.yaml"], "a config file, or --compare"),
    ],
)
def test_bad_input_gets_one_line(config_file, capsys, arguments, message):
    try:
        code = main(["plan", str(config_file), *arguments])
    except SystemExit as error:  # of argparse
        code = error.code
    found = capsys.readouterr()
    assert code == 2 and not found.out
    assert message in found.err and len(found.err.splitlines()) == 1
