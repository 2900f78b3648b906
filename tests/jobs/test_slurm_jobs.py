"""Plans on a real Slurm: killed tasks, chains whose later stages check again, names that a shell would run."""

import pytest

from mc2_hpc import jobs
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Plan, Slurm, Stage


@pytest.fixture
def engine(slurm_cluster, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.env[name])
    monkeypatch.setattr("mc2_hpc.jobs.slurm_queue.POLL_S", 0.5)
    return Slurm({"partition": slurm_cluster.partition, "time": "10"}, wait=True)


def run(engine, *stages):
    return jobs.run(Plan(stages, result=dict), engine)


def test_killed_task_names_its_shard(engine, tmp_path):
    shards = {"import os; os.kill(os.getpid(), 9)": {}, "pass": {}}
    with pytest.raises(UserError, match="s: a worker was killed at 'import os"):
        run(engine, Stage("s", tmp_path, shards, exec, ("never",)))


def test_what_comes_after_a_change_looks_again(engine, slurm_cluster, tmp_path, work):
    """The second stage is done when it is submitted, but no longer after the first has run."""
    source, copied = tmp_path / "source", tmp_path / "copied"
    source.write_text("old")
    copied.write_text("old")
    code = "open(folder + '/source', 'w').write('new')"
    write = Stage("write", tmp_path, {code: {"folder": str(tmp_path)}}, exec, ("never",))
    copy = Stage("copy", tmp_path, {"copied": source}, work.Copy(tmp_path), ("{shard}",))
    assert copy.undone() == []
    with pytest.raises(UserError, match="write: its Slurm job has ended but 1 of 1 shards are not done"):
        run(engine, write, copy)  # the first stage's outputs never exist, so it is never done
    slurm_cluster.wait_until(
        "the end of the chain", lambda: not slurm_cluster.command("squeue", "--noheader", "--format", "%j")
    )
    assert copied.read_text() == "new"


def test_a_folder_whose_name_a_shell_would_run(engine, tmp_path, work):
    """Real sbatch parses the option lines and must find the log folder despite these characters."""
    folder = tmp_path / "100% $(touch ran) `touch ran` 'a' \"b\" #c ; d"
    folder.mkdir()
    run(engine, Stage("s", folder, {"one shard": 2}, work.Touch(folder), ("{shard}",)))
    assert (folder / "one shard").read_text() == "xx"
    (log,) = (folder / "logs" / "s" / "slurm_logs").iterdir()
    assert log.name.endswith("_0.out") and not list(tmp_path.rglob("ran"))
