"""``mc2 plan`` from the command line, on a tiny model."""

import json
import sys

import pytest

from mc2_hpc.cli import main
from mc2_hpc.config import config_to_dict, yaml_text
from tests.planning.real_step import tiny_config


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
