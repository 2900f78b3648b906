"""curate.sbatch and bench.sbatch on a real Slurm."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mc2_hpc import doctor
from mc2_hpc.cli import main
from mc2_hpc.tar import write_tar

ROOT = Path(__file__).parents[2]
PYTHON = f"--export=ALL,MC2_PYTHON={sys.executable}"


@pytest.fixture
def pool(tmp_path) -> Path:
    """Three shards of English captions and images, and metadata for them."""
    image = io.BytesIO()
    Image.new("RGB", (16, 16), "grey").save(image, "JPEG")
    for shard in range(3):
        keys = [f"{shard}{number:02d}" for number in range(20)]
        texts = ["a red house", "a house", "red", "nothing"] * 5
        (tmp_path / "pool").mkdir(exist_ok=True)
        pq.write_table(
            pa.table({"key": keys, "text": texts, "lang": ["en"] * 20}), tmp_path / "pool" / f"{shard}.parquet"
        )
        write_tar(tmp_path / "pool" / f"{shard}.tar", ((f"{key}.jpg", image.getvalue()) for key in keys))
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "en.json").write_text(json.dumps(["red", "house", "a house"]), encoding="utf-8")
    return tmp_path / "pool"


def submit(cluster, folder: Path, script: str, *words: object, options: tuple[str, ...] = ()) -> str:
    """As a user would, in a checkout."""
    places = [f"--output={folder}/log", PYTHON, *options]
    return cluster.submit(*places, f"slurm/{script}", *map(str, words), cwd=ROOT)


def test_curation_by_arrays_equals_this_machine(slurm_cluster, pool, tmp_path):
    """Even if the job that supervises it is warned of its time limit and requeued."""
    rest = [pool, "--metadata", tmp_path / "metadata"]
    tasks = ["--slurm", "mem_per_cpu_gb=1", "--tasks", "2"]
    job_id = submit(slurm_cluster, tmp_path, "curate.sbatch", "match", *rest, "--out", tmp_path / "arrays", *tasks)
    slurm_cluster.wait_until("arrays in the queue", lambda: any((tmp_path / "arrays").glob("logs/match/job.json")))
    slurm_cluster.command("scancel", "--batch", "--signal=USR1", job_id)
    (ended,) = slurm_cluster.wait(job_id)
    log = (tmp_path / "log").read_text(encoding="utf-8", errors="replace")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert main(["curate", "match", *map(str, rest), "--out", str(tmp_path / "here"), "--workers", "1"]) == 0
    files = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*.parquet")]
    assert len(files) == 3
    for name in files:
        assert (tmp_path / "arrays" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name
    jobs = slurm_cluster.command("scontrol", "show", "job", "--oneliner").splitlines()
    own = [line for line in jobs if str(tmp_path) in line]  # other tests' jobs stay listed for a while
    assert sum("JobName=mc2-match " in line and "ArrayTaskId=" in line for line in own) == 2


def test_curation_that_cannot_be_done_is_tried_three_times(slurm_cluster, tmp_path):
    words = ["match", tmp_path / "nowhere", "--metadata", tmp_path, "--out", tmp_path / "out"]
    (ended,) = slurm_cluster.wait(submit(slurm_cluster, tmp_path, "curate.sbatch", *words))
    log = (tmp_path / "log").read_text(encoding="utf-8", errors="replace")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert "round 3 of 3 ended with exit code 2" in log and "nowhere" in log


@pytest.mark.parametrize("by_hand", [True, False], ids=["sbatch", "mc2 bench --slurm"])
def test_bench_runs_on_every_node(slurm_cluster, tmp_path, by_hand, monkeypatch, capsys):
    """With a benchmark that only prints where it ran, instead of one that takes minutes."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$SLURMD_NODENAME" "${SLURM_PROCID-no rank}" "$@" >"$6"\n')
    python.chmod(0o755)
    if by_hand:
        script = ["--nodes=2", "--gpus-per-node=1", f"--export=ALL,MC2_PYTHON={python},MC2_SLURM={ROOT / 'slurm'}"]
        job_id = slurm_cluster.submit(
            f"--output={tmp_path}/log", *script, ROOT / "slurm/bench.sbatch", "contrastive", "--quick", cwd=tmp_path
        )
    else:
        (tmp_path / "env.sh").write_text(f"export MC2_PYTHON={python}\n", encoding="utf-8")
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, slurm_cluster.env[name])
        monkeypatch.chdir(tmp_path)
        assert main(["bench", "contrastive", "--quick", "--slurm", "nodes=2", "gpus=1", "env=env.sh"]) == 0
        job_id = capsys.readouterr().out.strip()
    (ended,) = slurm_cluster.wait(job_id)
    assert ended["JobState"] == "COMPLETED", [path.read_text() for path in tmp_path.glob("*log")]
    for node in slurm_cluster.nodes:
        name = f"bench-{job_id}/contrastive-{node}.json"
        expected = [node, "no rank", "-m", "mc2_hpc.cli", "bench", "contrastive", "--json", name, "--quick"]
        assert (tmp_path / name).read_text().splitlines() == expected


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").iterdir(), key=str), ids=lambda path: path.name)
def test_scripts_are_well_formed(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_doctor_finds_slurm(slurm_cluster, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.env[name])
    (finding,) = doctor.examine_here(["Slurm"], full=False)
    assert finding.version == slurm_cluster.command("sbatch", "--version").split()[-1]
    assert (finding.status, finding.detail) == (doctor.OK, "sinfo answered")
