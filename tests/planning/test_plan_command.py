"""``mc2 plan`` from the command line, on a tiny model."""

import json
import subprocess
import sys

import pytest

from mc2_hpc.config import config_to_dict, yaml_text
from tests.planning.real_step import tiny_config


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml_text(config_to_dict(tiny_config(world_size=16, precision="bf16"))))
    return path


def plan(*arguments):
    command = [sys.executable, "-m", "mc2_hpc.cli", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_a_plan_with_advice(config_file, tmp_path):
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    done = plan(
        config_file, "--gpus", 16, "--caption-tokens", 8, "--price", 2, "--advise", "--json", out, "--html", page
    )
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
def test_bad_input_gets_one_line(config_file, arguments, message):
    done = plan(config_file, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
