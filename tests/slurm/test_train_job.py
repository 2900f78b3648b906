"""`mc2 train --slurm` on a real Slurm: after any disturbance, a job ends like an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

STEPS, EVERY = 120, 20


class Job:
    """A run of 120 steps that Slurm trains on two nodes, one rank each."""

    def __init__(self, cluster, output: Path, config: Path) -> None:
        self.cluster = cluster
        self.output = output
        self._config = config
        self.id = ""

    def submit(self, *overrides: str, slurm: tuple[str, ...] = ()) -> None:
        run = [f"output={self.output}", f"steps={STEPS}", f"checkpoint.every={EVERY}", "log_every=1", "data.workers=1"]
        words = ["train", str(self._config), *run, *overrides, "--timeout", "120"]
        slurm = ("nodes=2", "gpus=0", "ranks=1", "cpus=1", "time=20", *slurm)
        result = subprocess.run(
            [sys.executable, "-m", "mc2_hpc.cli", *words, "--slurm", *slurm],
            env={**self.cluster.env, "CUDA_VISIBLE_DEVICES": ""},  # use gloo on every machine
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        self.id = result.stdout.strip()

    def rows(self) -> dict[int, float]:
        """Loss by step."""
        path = self.output / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return {row["step"]: row["loss"] for row in map(json.loads, lines)}

    def newest(self) -> str:
        return (self.output / "checkpoints" / "latest").read_text(encoding="utf-8").strip()

    def log(self) -> str:
        return (self.output / f"slurm-{self.id}.log").read_text(encoding="utf-8", errors="replace")

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.cluster.job(self.id)["JobState"] != "FAILED", self.log()
            return max(self.rows(), default=0) >= step

        self.cluster.wait_until(f"step {step} of {self.output.name}", reached)

    def wait_for_more_steps(self) -> None:
        """Wait until there are more steps than any earlier start reached."""
        self.wait_for_step(max(self.rows()) + 3)

    def wait_for_restart(self, number: int, timeout_s: float = 120) -> None:
        def restarted() -> bool:
            job = self.cluster.job(self.id)
            return int(job["Restarts"]) == number and job["JobState"] in ("PENDING", "RUNNING")

        self.cluster.wait_until(f"restart {number} of {self.output.name}", restarted, timeout_s)

    def rank(self, number: int) -> list[int]:
        """Process ids of a rank: the trainer, then its decoding processes."""
        wanted = {f"SLURM_JOB_ID={self.id}".encode(), f"SLURM_PROCID={number}".encode()}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                python = "python" in (path / "comm").read_text()
                if python and wanted <= set((path / "environ").read_bytes().split(b"\0")):
                    found.append(int(path.name))
            except OSError:
                continue  # it has ended
        return sorted(found)

    def finish(self) -> dict[str, str]:
        return self.cluster.wait(self.id)[0]


@pytest.fixture(scope="module")
def make_job(slurm_cluster, module_config, tmp_path_factory) -> Iterator:
    jobs: list[Job] = []

    def make() -> Job:
        jobs.append(Job(slurm_cluster, tmp_path_factory.mktemp("job"), module_config))
        return jobs[-1]

    yield make
    for job in jobs:
        slurm_cluster.command("scancel", job.id, check=False)
        job.finish()
    slurm_cluster.resume_nodes()


@pytest.fixture(scope="module")
def undisturbed(make_job) -> Job:
    job = make_job()
    job.submit()
    ended = job.finish()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), job.log()
    assert ended["NodeList"] == "n[1-2]" and "mc2: the run is done" in job.log()
    return job


def assert_equal_runs(job: Job, undisturbed: Job) -> None:
    assert job.rows() == undisturbed.rows()
    last = f"checkpoints/step-{STEPS:08d}"
    files = sorted(path.name for path in (undisturbed.output / last).glob("*.safetensors"))
    assert len(files) == 4  # two kinds from two ranks
    for name in files:
        found, expected = load_file(job.output / last / name), load_file(undisturbed.output / last / name)
        assert found.keys() == expected.keys()
        assert all(found[key].equal(expected[key]) for key in expected), name


def test_job_survives_signal_requeue_kill_and_node_failure(make_job, undisturbed, slurm_cluster):
    job = make_job()
    job.submit()
    # Slurm's warning before the time limit: saved at once, queued again by the script.
    job.wait_for_step(8)
    slurm_cluster.command("scancel", "--signal=USR1", job.id)
    job.wait_for_restart(1)
    assert "SIGUSR1: saved after step" in job.log()
    saved = int(job.newest().removeprefix("step-"))
    assert 8 <= saved < STEPS
    # Preemption: SIGTERM, then Slurm itself requeues the job, once.
    job.wait_for_more_steps()
    slurm_cluster.command("scontrol", "requeue", job.id)
    job.wait_for_restart(2)
    assert "SIGTERM: saved after step" in job.log()
    # A rank is killed: the others end too, and the job restarts from the newest checkpoint.
    job.wait_for_more_steps()
    trainer, *_ = job.rank(1)
    os.kill(trainer, signal.SIGKILL)
    job.wait_for_restart(3)
    # A node fails: Slurm ends the rest of the job and requeues it itself.
    job.wait_for_more_steps()
    slurm_cluster.command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    job.wait_for_restart(4)
    slurm_cluster.resume_nodes()
    ended = job.finish()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "4"), job.log()
    assert_equal_runs(job, undisturbed)


@pytest.mark.slow  # two whole runs
def test_a_run_in_stages_survives_a_requeue_in_each(make_job, slurm_cluster):
    stages = f"stages=[{{steps: {STEPS // 2}, model: {{patch_dropout: 0.5}}}}, {{steps: {STEPS // 2}}}]"
    undisturbed, job = make_job(), make_job()
    undisturbed.submit(stages)
    assert undisturbed.finish()["JobState"] == "COMPLETED", undisturbed.log()
    job.submit(stages)
    for number, step in ((1, 8), (2, STEPS // 2 + 5)):
        job.wait_for_step(step)
        slurm_cluster.command("scontrol", "requeue", job.id)
        job.wait_for_restart(number)
    ended = job.finish()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), job.log()
    assert_equal_runs(job, undisturbed)


def test_cancelled_job_saves_stays_cancelled_and_is_continued_by_another(make_job, undisturbed, slurm_cluster):
    job = make_job()
    job.submit()
    job.wait_for_step(EVERY + 5)
    slurm_cluster.command("scancel", job.id)
    ended = job.finish()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), job.log()
    saved = int(job.newest().removeprefix("step-"))
    assert saved == max(job.rows()) >= EVERY + 5
    first = job.id
    job.submit()
    assert job.id != first and job.finish()["JobState"] == "COMPLETED"
    assert f"after step {saved}" in job.log()
    assert_equal_runs(job, undisturbed)


@pytest.mark.slow  # Slurm counts time limits in minutes
def test_time_limit_does_not_end_the_run(make_job, slurm_cluster):
    job = make_job()
    job.submit("steps=100000", "checkpoint.every=100000", "log_every=10", slurm=("time=2", "signal=USR1@30"))
    job.wait_for_restart(1, timeout_s=200)
    assert "SIGUSR1: saved after step" in job.log() and "TIME LIMIT" not in job.log()
    job.wait_for_more_steps()
    assert f"resuming {job.output}/checkpoints/{job.newest()}" in job.log()
    slurm_cluster.command("scancel", job.id)


def test_non_finite_loss_is_not_requeued(make_job):
    job = make_job()
    job.submit("optim.lr=1e30", "optim.warmup=0")
    ended = job.finish()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), job.log()
    assert "another start would not help" in job.log()


@pytest.mark.slow  # as many starts as it takes to give up
def test_job_that_always_dies_is_given_up(make_job, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nif [ "$2" = mc2_hpc.cli ]; then kill -9 $$; fi\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = tmp_path / "env.sh"
    environment.write_text(f"export MC2_PYTHON={python} MC2_MAX_STARTS=1\n")
    job = make_job()
    job.submit(slurm=(f"env={environment}",))
    ended = job.finish()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "1"), job.log()
    assert "giving up after 1 starts of job" in job.log() and "without a new checkpoint (newest: none)" in job.log()


def test_script_by_hand_says_bad_input_once(slurm_cluster, module_config, tmp_path):
    """`sbatch slurm/train.sbatch` in a checkout; the ranks are never started."""
    root = Path(__file__).parents[2]
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/log"]
    options.append(f"--export=ALL,MC2_PYTHON={sys.executable}")
    run = ["slurm/train.sbatch", module_config, f"output={tmp_path}", "optim.lear=1"]
    job_id = slurm_cluster.submit(*options, *run, cwd=root)
    (ended,) = slurm_cluster.wait(job_id)
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert log.count("unknown key 'optim.lear'") == 1 and "srun" not in log
