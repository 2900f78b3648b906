"""A run in stages: what a stage may set, the learning rate over all of them, and that such a run is the same to the bit
as its stages by hand, from wherever it resumes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mc2_hpc.config import config_from_dict, config_to_dict, load_config
from mc2_hpc.config_stages import run_stages, stage_after
from mc2_hpc.errors import UserError
from mc2_hpc.models.weights import load_clip
from mc2_hpc.training.optim import stage_learning_rate
from tests.faults.tiny_run import write_config
from tests.training.test_cli_train import processes_of, rows, tensors

pytestmark = pytest.mark.timeout(600)

STAGES = [
    {"steps": 3, "model": {"patch_dropout": 0.5, "vision": {"image_size": 32}}},
    {"samples": 40, "global_batch": 16, "model": {"vision": {"image_size": 48}}},
    {"steps": 2, "model": {"vision": {"image_size": 32}}, "optim": {"schedule": "wsd", "decay_steps": 2}},
]
BORDERS, STEPS = (3, 6), 8
BY_HAND = [
    ["steps=3", "model.patch_dropout=0.5"],
    ["steps=6", "global_batch=16", "model.vision.image_size=48"],
    ["steps=8", "optim.schedule=wsd", "optim.decay_steps=2"],
]


# ---- settings


def configured(stages, **top):
    return config_from_dict({"stages": stages, "global_batch": 1024, "optim": {"warmup": 2}, **top})


def test_a_stage_overrides_the_run():
    config = configured(STAGES, global_batch=512, data={"lanes": 8})
    stages = run_stages(config)
    assert config.steps == STEPS and [(stage.begin, stage.end) for stage in stages] == [(0, 3), (3, 6), (6, 8)]
    assert [stage.config.model.patch_dropout for stage in stages] == [0.5, 0, 0]
    assert [stage.config.model.vision.image_size for stage in stages] == [32, 48, 32]
    assert [stage.config.global_batch for stage in stages] == [512, 16, 512]
    assert all(stage.config.steps == STEPS and not stage.config.stages for stage in stages)
    assert [stage_after(config, step).number for step in range(10)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_samples_are_rounded_up_to_steps_of_the_stages_own_batch():
    config = configured([{"samples": 4097}, {"samples": 4096, "global_batch": 512}])
    assert [(stage.begin, stage.end) for stage in run_stages(config)] == [(0, 5), (5, 13)]


def test_the_learning_rate_is_that_of_the_whole_run_or_of_the_stage():
    own = {"schedule": "cosine", "lr": 2.0, "warmup": 1}
    config = configured([{"steps": 4}, {"steps": 3, "optim": own}, {"steps": 3}], optim={"lr": 1.0, "warmup": 2})
    found = [stage_learning_rate(step, stage_after(config, step)) for step in range(10)]
    run = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * (step - 2) / 8)) for step in range(2, 10))]
    assert found == pytest.approx([*run[:4], 2.0, 2.0, 1.0, *run[7:]])


@pytest.mark.parametrize(
    "stages, top, words",
    [
        ([{"steps": 2, "samples": 9}], {}, "each stage needs either steps or samples"),
        ([{}], {}, "each stage needs either steps or samples"),
        ([{"steps": 0}], {}, "a stage of 0 steps or samples: must be at least 1"),
        ([{"steps": 2}], {"steps": 3}, "steps=3: the stages have 2; leave out steps"),
        ([{"steps": 2}, {"steps": 1, "global_batch": 100}], {}, "stages: stage 2: global_batch=100 is not a multiple"),
        ([{"steps": 2, "model": {"patch_dropout": 1.0}}], {}, "stages: stage 1: model.patch_dropout=1.0: must be in"),
        ([{"steps": 2, "optim": {"lr": 0.1}}], {}, "stages: optim has lr, warmup or decay_steps without schedule"),
        (
            [{"steps": 2, "optim": {"schedule": "wsd"}}],
            {},
            "stages: stage 1: optim.decay_steps=0 with optim.schedule=wsd",
        ),
        (
            [{"steps": 2, "optim": {"schedule": "cosine", "warmup": 3}}],
            {},
            "stages: stage 1: has only 2 steps to warm up and decay in",
        ),
        ([{"steps": 2}], {"checkpoint": {"resume": False}}, "stages and checkpoint.resume=false"),
        ([{"steps": 2}], {"data": {"features": "/f"}, "freeze": {"vision": "all"}}, "stages and data.features"),
        ([STAGES[0], {"steps": 2}], {}, "stage 1 sets model.vision.image_size and stage 2 does not: set it in every"),
        ([{"steps": 2, "output": "elsewhere"}], {}, "unknown key 'output'"),
        ([{"steps": 2, "data": {"lanes": 2}}], {}, "unknown key 'data.lanes'"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages, top, words):
    with pytest.raises(UserError) as error:
        configured(stages, **top)
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- runs


@pytest.fixture(scope="module")
def config(tiny_pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    values = {
        # Muon and the sigmoid loss, so that their state too passes from stage to stage.
        "optim": {"matrices": "muon", "lr": 1e-3, "warmup": 2, "schedule": "constant", "ema_decay": 0.5},
        "loss": {"kind": "sigmoid"},
        "checkpoint": {"every": 1, "keep": 20},
    }
    return write_config(folder / "run.yaml", tiny_pool, stages=STAGES, log_every=1, **values)


def train(ranks_of, config, run, *overrides):
    return ranks_of(2, "-m", "mc2_hpc.cli", "train", config, f"output={run}", *overrides)


@pytest.fixture(scope="module")
def staged(ranks_of, config, tmp_path_factory):
    """The folder of a run through all stages in one go, and its log."""
    run = tmp_path_factory.mktemp("staged")
    log = train(ranks_of, config, run).stderr
    return run, log


def same_bits(found, expected):
    for prefix in ("model", "optimizer", "ema"):
        ours, theirs = (tensors(run / "checkpoints" / f"step-{STEPS:08d}", prefix) for run in (found, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), prefix
    ours, theirs = (
        {step: (row["loss"], row["lr"], row["samples_seen"]) for step, row in rows(run).items()}
        for run in (found, expected)
    )
    assert ours == theirs and sorted(ours) == list(range(1, STEPS + 1))


def test_it_equals_its_stages_by_hand(ranks_of, config, staged, tmp_path):
    for stage in BY_HAND:
        train(ranks_of, config, tmp_path, "stages=[]", *stage)
    same_bits(tmp_path, staged[0])


def test_every_stage_is_what_it_says(staged):
    run, log = staged
    assert [row["samples_seen"] for row in rows(run).values()] == [32, 64, 96, 112, 128, 144, 176, 208]
    sizes = [load_clip(run / "checkpoints" / f"step-{step:08d}")[1].arch.vision.image_size for step in (3, 4, 6, 8)]
    assert sizes == [32, 48, 48, 32]
    for words in (
        "stage 1 of 3, to step 3",
        "stage 3 of 3, to step 8",
        "model.patch_dropout 0.5 -> 0.0",
        "32 px (2 x 2",
    ):
        assert words in log
    assert "from here on: global_batch 32 -> 16" in log and "not as in" not in log
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["steps"]) == ("finished", STEPS)


def test_moments_of_interpolated_positions_begin_again(staged):
    """Those of all other weights continue."""
    before, after = (tensors(staged[0] / "checkpoints" / f"step-{step:08d}", "optimizer") for step in (3, 4))
    name = "vision.positional_embedding.exp_avg_sq"
    assert before[name].shape[0] == 5 and after[name].shape[0] == 10
    # One step's: (1 - beta2) g^2, against (1 - beta) g of the other moment.
    first = after["vision.positional_embedding.exp_avg"]
    torch.testing.assert_close(after[name], 0.05 * (first / 0.1).square(), rtol=1e-4, atol=1e-20)


@pytest.mark.parametrize("step", [2, *BORDERS, 7])
def test_it_resumes_from_every_step(ranks_of, config, staged, tmp_path, step):
    """With the checkpoints that a run has if it is killed right after saving the step: in a stage, or on its border."""
    shutil.copytree(staged[0], tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").glob("step-*"):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    log = train(ranks_of, config, tmp_path).stderr
    assert f"step-{step:08d} after step {step}" in log
    same_bits(tmp_path, staged[0])


def test_a_finished_run_does_nothing(ranks_of, config, staged):
    assert "nothing to do" in train(ranks_of, config, staged[0]).stderr
    assert sorted(rows(staged[0])) == list(range(1, STEPS + 1))


def test_kill_9_between_two_stages(ranks_of, config, staged, tmp_path):
    """Real processes, killed as soon as the first stage is saved: on the border, or in the next stage's start."""
    command = [sys.executable, "-m", "mc2_hpc.cli", "train", str(config), "--processes", "2", f"output={tmp_path}"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    saved, deadline = tmp_path / "checkpoints" / "step-00000003", time.monotonic() + 240
    while not saved.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    for pid in processes_of(tmp_path).values():
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (tmp_path / "checkpoints" / "step-00000006").exists()
    train(ranks_of, config, tmp_path)
    same_bits(tmp_path, staged[0])


def test_what_is_left_may_be_planned_anew(ranks_of, config, staged, tmp_path):
    """A resumed run may have other stages, which are then not what its checkpoint was trained for."""
    shutil.copytree(staged[0], tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").glob("step-*"):
        if path.name > "step-00000006":
            shutil.rmtree(path)
    log = train(ranks_of, config, tmp_path, "stages=[{steps: 6}, {steps: 1, model: {patch_dropout: 0.25}}]").stderr
    assert "not as in step-00000006: model.patch_dropout 0.0 -> 0.25" in log and "step-00000007" in log


def test_the_shipped_example_has_a_full_token_tail():
    config = load_config(Path(__file__).parents[2] / "configs/train/vit_h14_stages.yaml")
    first, *_, last = run_stages(config)
    assert (first.config.model.vision.image_size, last.config.model.vision.image_size) == (112, 224)
    assert config.steps * config.global_batch == pytest.approx(29.44e9, rel=1e-3)
    assert last.end - last.begin == pytest.approx(config.steps / 10, rel=1e-3) and not last.own_schedule
