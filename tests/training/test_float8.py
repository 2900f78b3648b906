"""Runs with ``precision: fp8``: their checkpoints, resuming with and without it, their evaluation, and refusals."""

import json
import shutil
import statistics

import pytest
import torch
import yaml
from rich.console import Console

from mc2_hpc.cli import main
from mc2_hpc.config import RunConfig, config_from_dict
from mc2_hpc.errors import UserError
from mc2_hpc.models.weights import load_clip
from mc2_hpc.quickstart.recipe import Recipe
from mc2_hpc.quickstart.run import prepare_data
from mc2_hpc.quickstart.stages import Stages
from tests.faults.tiny_run import write_caption_set, write_config
from tests.training.test_cli_train import rows, tensors

pytestmark = pytest.mark.timeout(600)
STEPS, HALF = 6, 3


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Sixteen images with captions."""
    folder = tmp_path_factory.mktemp("sets")
    write_caption_set(folder / "squares", {"en": "square"})
    path = folder / "suite.yaml"
    sets = {"squares": {"reader": "caption_lines", "path": "squares"}}
    path.write_text(yaml.safe_dump({"root": str(folder), "sets": sets}))
    return path


@pytest.fixture(scope="module")
def trained(ranks_of, tiny_pool, suite, tmp_path_factory):
    """The folder of runs of six steps: ``fp8`` and ``bf16``, each with another that continues after three steps in the
    other's precision, ``fp8_bf16`` and ``bf16_fp8``; ``same``, which continues in its own and recomputes norms and
    activations; and ``lean``, at another stage, in larger micro-batches, recomputing its blocks."""
    folder = tmp_path_factory.mktemp("fp8")
    config = write_config(
        folder / "run.yaml",
        tiny_pool,
        steps=STEPS,
        fp8_min_size=48,
        log_every=1,
        micro_batch=8,
        optim={"lr": 2e-3, "warmup": 2, "schedule": "constant", "ema_decay": 0.9},
        zero={"stage": 2},
        checkpoint={"every": HALF, "keep": 2},
    )

    def train(run, precision, *options):
        options = [f"output={folder}/{run}", f"precision={precision}", *options]
        ranks_of(2, "-m", "mc2_hpc.cli", "train", config, *options)

    def resume(before, run, precision, *options):
        shutil.copytree(folder / before, folder / run)
        shutil.rmtree(last(folder / run))
        train(run, precision, *options)

    train("fp8", "fp8", f"eval.suite={suite}", f"eval.every={STEPS}")
    train("bf16", "bf16")
    resume("fp8", "same", "fp8", "model.recompute=selective")
    resume("fp8", "fp8_bf16", "bf16")
    resume("bf16", "bf16_fp8", "fp8")
    train("lean", "fp8", "micro_batch=0", "model.recompute=full", "zero.stage=0")
    return folder


def last(run):
    return run / "checkpoints" / f"step-{STEPS:08d}"


def test_checkpoints_are_those_of_bf16(trained):
    """By names, types and shapes; they load like any other."""
    for prefix in ("model", "optimizer", "ema"):
        fp8, bf16 = (
            {name: (tensor.shape, tensor.dtype) for name, tensor in tensors(last(trained / run), prefix).items()}
            for run in ("fp8", "bf16")
        )
        assert fp8 == bf16
    assert not any(torch.equal(a, b) for a, b in zip(*weights(trained, "fp8", "bf16"), strict=True))
    load_clip(last(trained / "fp8"))


def weights(folder, *runs):
    """The matrices of the blocks of each run."""
    found = [tensors(last(folder / run), "model") for run in runs]
    return [[each[name] for name in sorted(each) if name.endswith("qkv.weight")] for each in found]


def test_it_learns_like_bf16(trained):
    fp8, bf16, lean = (rows(trained / run) for run in ("fp8", "bf16", "lean"))
    for step in range(1, STEPS + 1):
        assert fp8[step]["loss"] == pytest.approx(bf16[step]["loss"], rel=3e-2)
        assert lean[step]["loss"] == pytest.approx(fp8[step]["loss"], rel=3e-2)
    assert fp8[1]["loss"] != bf16[1]["loss"] and fp8[STEPS]["loss"] < fp8[1]["loss"] - 0.1


def test_it_resumes_bitwise(trained):
    for prefix in ("model", "optimizer", "ema"):
        whole, same = (tensors(last(trained / run), prefix) for run in ("fp8", "same"))
        assert whole.keys() == same.keys()
        assert all(torch.equal(same[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("before, after", [("fp8", "bf16"), ("bf16", "fp8")])
def test_it_resumes_in_another_precision(trained, before, after):
    """The first steps are those of one run, the others are those of neither."""
    one, other, changed = (rows(trained / run) for run in (before, after, f"{before}_{after}"))
    assert all(changed[step]["loss"] == one[step]["loss"] for step in range(1, HALF + 1))
    for step in range(HALF + 1, STEPS + 1):
        assert changed[step]["loss"] not in (one[step]["loss"], other[step]["loss"])
        assert changed[step]["loss"] == pytest.approx(one[step]["loss"], rel=3e-2)


def test_it_is_evaluated_in_bf16(trained, suite, tmp_path):
    (line,) = (trained / "fp8" / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    arguments = ["eval", str(trained / "fp8"), "--suite", str(suite), "--out", str(tmp_path), "--precision", "bf16"]
    assert main(arguments) == 0
    again = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert json.loads(line)["sets"]["squares"]["groups"] == again["sets"]["squares"]["groups"]


def test_whole_weights_are_not_kept_at_stage_3():
    with pytest.raises(UserError, match="precision=fp8 and zero.stage=3: .*; set zero.stage to 0, 1 or 2$"):
        config_from_dict({"precision": "fp8", "zero": {"stage": 3}})
    values = {"zero": {"stage": 3}, "stages": [{"steps": 2}, {"steps": 2, "precision": "fp8"}]}
    with pytest.raises(UserError, match="stages: stage 2: precision=fp8 and zero.stage=3"):
        config_from_dict(values)
    assert RunConfig().precision == "bf16"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_200_steps_of_the_quickstart_learn_like_bf16(ranks_of, tmp_path):
    """Its model, data and batch: the mean loss of the last 20 steps is within 1 % of that in bf16."""
    recipe = Recipe(images=4_000, shards=4, heldout_per_number=1, steps=200, warmup=40, decay_steps=100)
    prepare_data(tmp_path, recipe, Stages(7, Console(quiet=True)))
    losses = {}
    for precision in ("bf16", "fp8"):
        options = [f"precision={precision}", "fp8_min_size=128", "log_every=1", f"output={tmp_path}/{precision}"]
        ranks_of(1, "-m", "mc2_hpc.cli", "train", tmp_path / "train.yaml", *options, timeout=800)
        found = rows(tmp_path / precision)
        losses[precision] = [found[step]["loss"] for step in range(1, recipe.steps + 1)]
    bf16, fp8 = (statistics.mean(losses[precision][-20:]) for precision in ("bf16", "fp8"))
    assert losses["fp8"] != losses["bf16"] and bf16 < losses["bf16"][0] - 0.5
    print(f"mean loss of the last 20 steps: bf16 {bf16:.4f}, fp8 {fp8:.4f}")
    assert fp8 == pytest.approx(bf16, rel=0.01)
