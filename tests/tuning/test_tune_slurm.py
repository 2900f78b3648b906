"""``mc2 tune --slurm`` on a real cluster, and what its jobs are."""

import json
import os
import signal
import sys
import time

import pytest

from mc2_hpc.cli import main
from mc2_hpc.errors import UserError
from mc2_hpc.tuning.cluster import SlurmRunner, cluster_machine
from mc2_hpc.tuning.trial import Trial

SLURM = ["--slurm", "nodes=2", "gpus=0", "ranks=1", "cpus=1"]


def test_a_trial_is_a_job_that_is_not_requeued(module_config, tmp_path, capsys):
    words = ["tune", str(module_config), "--out", str(tmp_path / "out"), "--minutes", "7", "--dry-run"]
    assert main([*words, "data.lanes=32", "--slurm", "nodes=4", "gpus=8", "partition=p"]) == 0
    script = capsys.readouterr().out
    for line in ("nodes=4", "gpus-per-node=8", "ntasks-per-node=8", "partition=p", "time=12", "job-name=mc2-tune"):
        assert f"#SBATCH --{line}\n" in script
    assert script.index("#SBATCH --requeue\n") < script.index("#SBATCH --no-requeue\n")
    assert f"set -- {tmp_path / 'out' / 'trials' / 'first' / 'trial.yaml'}\n" in script


def test_the_memory_of_a_gpu_is_known_by_its_name(monkeypatch):
    monkeypatch.setenv("PATH", "")
    options = {"nodes": "4", "gpus": "8"}
    named, unnamed = cluster_machine(options, gpu="h100"), cluster_machine(options, gpu=None)
    assert (named.ranks, named.ranks_per_node, named.device_type) == (32, 8, "cuda")
    assert named.memory_bytes is not None and unnamed.memory_bytes is None
    with pytest.raises(UserError, match="--gpu h900"):
        cluster_machine(options, gpu="h900")
    with pytest.raises(UserError, match="how many ranks per node"):
        cluster_machine({"gpus": "0"}, gpu=None)


def test_nothing_is_submitted_once_the_time_is_up(config, tmp_path, monkeypatch):
    trial = Trial(key="a", config=config, settings={}, steps=4, folder=tmp_path / "trials" / "a", ranks=2, bound_s=1)
    monkeypatch.setenv("PATH", "")
    reported = []
    SlurmRunner({"gpus": "0", "ranks": "2"}).run([trial], reported.append, until=time.monotonic())
    assert not reported and not trial.folder.exists()


@pytest.fixture
def command(slurm_cluster, module_config, tmp_path):
    out = tmp_path / "out"
    words = ["tune", str(module_config), "data.workers=0", "--trials", "2", "--steps", "2", "--minutes", "14"]
    words = [sys.executable, "-m", "mc2_hpc.cli", *words, "--out", str(out), *SLURM]
    yield words, out, {**slurm_cluster.env, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for path in out.glob("trials/*/job.json"):
        slurm_cluster.command("scancel", json.loads(path.read_text())["job"], check=False)


def test_trials_are_jobs_and_a_killed_search_finds_its_own(command, slurm_cluster, fork_server):
    words, out, environment = command
    killed = fork_server.start(words, env=environment)

    def submitted() -> bool:
        assert killed.poll() is None, killed.communicate()
        return bool(list(out.glob("trials/*/job.json")))

    slurm_cluster.wait_until("the first trial's job", submitted, timeout_s=300)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (path,) = out.glob("trials/*/job.json")
    job = json.loads(path.read_text())["job"]
    result = fork_server.run(words, env=environment, timeout=840)
    assert result.returncode == 0, result.stderr
    assert f"Slurm job {job}, of an earlier call: as given" in result.stderr
    assert json.loads(path.read_text())["job"] == job
    found = json.loads((out / "tune.json").read_text())
    assert found["machine"]["ranks"] == 2 and [trial["status"] for trial in found["trials"]] == ["ok", "ok"]
    assert all(trial["waits"]["network"] > 0 for trial in found["trials"])
    assert slurm_cluster.job(job)["Requeue"] == "0"
    again = fork_server.run(words, env=environment, timeout=300)
    assert again.returncode == 0 and "Slurm job" not in again.stderr, again.stderr
    assert again.stdout == result.stdout
