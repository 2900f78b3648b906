"""``mc2 train`` end to end on several gloo processes: learning, resuming, stopping."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mc2_hpc.conversion.convert import convert
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import load_clip
from mc2_hpc.training.checkpoint import find_damage
from tests.faults.diary import rows

STEPS = 60  # long enough to kill the run between the checkpoint of step 10 and the end
SHORT = "steps=20", "optim.schedule=constant"  # of runs that nothing kills


def tensors(checkpoint, prefix):
    files = TensorFiles(checkpoint, prefix)
    return {name: files.get(name) for name in files.names()}


def train(ranks_of, config, run, processes=2, *overrides, **options):
    """Train with ``ranks_of``, or with ``torchrun`` in its place."""
    arguments = [f"output={run}", f"steps={STEPS}", "checkpoint.every=10", *overrides]
    return ranks_of(processes, "-m", "mc2_hpc.cli", "train", config, *arguments, **options)


@pytest.fixture(scope="module")
def undisturbed(ranks_of, module_config, tmp_path_factory):
    """A finished run on 2 ranks at ZeRO stage 1."""
    run = tmp_path_factory.mktemp("undisturbed")
    train(ranks_of, module_config, run)
    return run


@pytest.fixture(scope="module")
def short(ranks_of, module_config, tmp_path_factory):
    """A finished run of 20 steps on 2 ranks at ZeRO stage 1."""
    run = tmp_path_factory.mktemp("short")
    train(ranks_of, module_config, run, 2, *SHORT)
    return run


@pytest.fixture(scope="module")
def half(ranks_of, module_config, tmp_path_factory):
    """The same run after 10 steps; tests resume from copies."""
    run = tmp_path_factory.mktemp("half")
    train(ranks_of, module_config, run, 2, *SHORT, "steps=10")
    return run


def start(config, run, *options):
    """The same run, started as a user would on a single machine."""
    command = [sys.executable, "-m", "mc2_hpc.cli", "train", str(config), "--processes", "2", *options]
    return subprocess.Popen(
        [*command, f"output={run}", f"steps={STEPS}", "checkpoint.every=10"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(process, run):
    latest, deadline = run / "checkpoints" / "latest", time.monotonic() + 120
    while not latest.exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint within 120 s"
        time.sleep(0.01)


def processes_of(run):
    """Ids of all processes with the run in their command line, by rank; the launcher's is under ``None``."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        if str(run).encode() in command:
            rank = next((int(line[5:]) for line in environment if line.startswith(b"RANK=")), None)
            found[rank] = int(folder.name)
    return found


@pytest.fixture(scope="module")
def killed(module_config, tmp_path_factory):
    """The same run, all its processes killed with -9 soon after the checkpoint of step 10; tests resume from copies."""
    run = tmp_path_factory.mktemp("killed")
    process = start(module_config, run)
    wait_for_checkpoint(process, run)
    for pid in processes_of(run).values():
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert (run / "checkpoints" / "latest").read_text().strip() < f"step-{STEPS:08d}", "it ended before it was killed"
    return run


def resumed(ranks_of, config, killed, run, processes=2, *overrides):
    shutil.copytree(killed, run, dirs_exist_ok=True)
    train(ranks_of, config, run, processes, *overrides)


def test_learns_and_saves(undisturbed):
    metrics = rows(undisturbed)
    assert sorted(metrics) == list(range(2, STEPS + 1, 2))
    assert metrics[STEPS]["loss"] < metrics[2]["loss"] - 0.5
    assert metrics[STEPS]["samples_seen"] == STEPS * 32
    for key in ("logit_scale", "lr", "grad_norm", "samples_per_second", "mfu", "data_wait"):
        assert metrics[STEPS][key] > 0, key
    assert metrics[STEPS]["data_wait"] < 1
    assert metrics[STEPS]["language_share"] == {"en": 1.0}
    checkpoints = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert checkpoints == ["latest", "step-00000050", "step-00000060"]  # keep: 2
    assert list((undisturbed / "tensorboard").glob("events.*"))


def test_checkpoint_is_a_model(undisturbed):
    model, card = load_clip(undisturbed)
    assert card.tokenizer_style == "xlmv"
    image_features, text_features, scale = model(torch.zeros(1, 3, 32, 32), torch.tensor([[0, 5, 2]]))
    assert image_features.shape == text_features.shape == (1, 32)
    metrics = rows(undisturbed)
    assert float(scale.detach().exp()) == pytest.approx(metrics[STEPS]["logit_scale"], rel=1e-6)


def same_bits(found_run, expected_run):
    for prefix in ("model", "optimizer"):
        found = tensors(found_run / "checkpoints" / "step-00000060", prefix)
        expected = tensors(expected_run / "checkpoints" / "step-00000060", prefix)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    before, after = rows(expected_run), rows(found_run)
    assert {step: row["loss"] for step, row in after.items()} == {step: row["loss"] for step, row in before.items()}


def test_resumes_bitwise_after_kill(torchrun, undisturbed, killed, module_config, tmp_path):
    """Under torchrun, with real processes as ranks, like a user's."""
    resumed(torchrun, module_config, killed, tmp_path)
    same_bits(tmp_path, undisturbed)


def test_restarts_by_itself_when_a_rank_is_killed(undisturbed, module_config, tmp_path):
    process = start(module_config, tmp_path, "--restarts", "1")
    wait_for_checkpoint(process, tmp_path)
    os.kill(processes_of(tmp_path)[1], signal.SIGKILL)
    _, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    for words in ("rank 1 was killed by SIGKILL", "rank 0 lost another rank in step", "restart 1 of 1", "resuming"):
        assert words in log
    same_bits(tmp_path, undisturbed)


@pytest.mark.parametrize("processes, stage, embedding", [(1, 2, "dense"), (3, 3, "sharded")])
def test_resumes_on_other_ranks_and_stages(
    ranks_of, short, half, module_config, tmp_path, open_clip, processes, stage, embedding
):
    """10 steps on 2 ranks at stage 1, 10 with other settings: same samples, so same losses up to rounding."""
    settings = f"zero.stage={stage}", f"model.embedding={embedding}"
    resumed(ranks_of, module_config, half, tmp_path, processes, *SHORT, *settings)
    before, after = rows(short), rows(tmp_path)
    assert before.keys() == after.keys() and max(after) == 20
    for step in before:
        assert after[step]["loss"] == pytest.approx(before[step]["loss"], rel=1e-5), step
    trainer = [json.loads((run / "checkpoints/step-00000020/trainer.json").read_text()) for run in (short, tmp_path)]
    assert trainer[0]["position"] == trainer[1]["position"]
    assert trainer[1]["world_size"] == processes
    # The checkpoint converts, whatever settings wrote it, and open_clip gives our model's outputs.
    out = convert(tmp_path, "open_clip", tmp_path / "open_clip")
    theirs = open_clip.create_model_and_transforms(f"local-dir:{out}")[0].eval()
    ours, _ = load_clip(tmp_path)
    images, tokens = torch.randn(2, 3, 32, 32), torch.tensor([[0, 7, 9, 2], [0, 8, 2, 1]])
    padded = torch.nn.functional.pad(tokens, (0, 20), value=1)  # open_clip needs full-length rows
    with torch.no_grad():
        image_features, text_features, scale = ours(images, tokens)
        expected = scale.exp() * image_features @ text_features.T
        found = theirs(images, padded)
    torch.testing.assert_close(found[2] * found[0] @ found[1].T, expected, rtol=0, atol=1e-5)


def test_micro_batches_change_nothing(ranks_of, short, module_config, tmp_path):
    train(ranks_of, module_config, tmp_path, 2, *SHORT, "micro_batch=6")
    before, after = rows(short), rows(tmp_path)
    assert before.keys() == after.keys()
    for step in before:
        assert after[step]["loss"] == pytest.approx(before[step]["loss"], rel=1e-4), step


def test_non_finite_loss_stops_and_keeps_the_checkpoint(ranks_of, module_config, tmp_path):
    train(ranks_of, module_config, tmp_path, 1, "steps=10")
    result = train(ranks_of, module_config, tmp_path, 1, "optim.lr=1e30", "optim.warmup=0", check=False)
    assert result.returncode != 0
    line = next(line for line in result.stderr.splitlines() if "mc2:" in line)
    assert "nan at step 12" in line or "inf at step 11" in line or "nan at step 11" in line
    assert "step-00000010" in line and "keys of rank 0's batch: 0" in line
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step-00000010"
    assert find_damage(tmp_path / "checkpoints" / "step-00000010") is None


def test_finished_run_has_nothing_to_do(ranks_of, undisturbed, module_config):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert "nothing to do" in train(ranks_of, module_config, undisturbed, 1).stderr
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
