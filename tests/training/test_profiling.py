"""``profile.steps``: training is unchanged to the bit, a signal saves as always, and the files are readable."""

import gzip
import json
import re

import pytest
import torch

from mc2_hpc.config import config_from_dict
from mc2_hpc.distributed import Ranks
from mc2_hpc.errors import UserError
from mc2_hpc.models.weights import TensorFiles
from mc2_hpc.training.profiling import StepProfiler
from mc2_hpc.training.stop import SAVED
from tests.faults import matrix

STEPS, FIRST, LAST = 12, 3, 8


def rows(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in map(json.loads, lines)}


def steps_of(trace):
    """Numbers of the steps that a trace has, and how many of its events are allocations."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [found[1] for event in events if (found := re.fullmatch(r"step (\d+)", event["name"]))]
    return sorted(set(map(int, steps))), sum(event["name"] == "[memory]" for event in events)


@pytest.fixture(scope="module")
def runs(module_config, fork_server, tmp_path_factory):
    """An undisturbed run; a profiled one, which a signal stopped at step 5, resumed; and the step that was saved."""
    starter, folders = matrix.Starter(fork_server), []
    overrides = [f"steps={STEPS}", "log_every=1", "checkpoint.every=1000"]
    signal = {"at": "forward", "step": FIRST + 2, "rank": 0, "do": ["TERM"]}
    for faults, codes in (([], [0]), ([signal], [SAVED, 0])):
        folders.append(tmp_path_factory.mktemp("run"))
        more = [f"profile.steps=[{FIRST},{LAST}]"] if faults else []
        job = matrix.job(module_config, folders[-1], processes=1, faults=faults, overrides=[*overrides, *more])
        for code in codes:
            assert starter.run(job) == code, (folders[-1] / "log").read_text()
            if code == SAVED:
                saved = int((folders[-1] / "run" / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    return *(folder / "run" for folder in folders), saved


def test_training_is_unchanged_to_the_bit(runs):
    plain, profiled, _ = runs
    assert rows(plain) == rows(profiled) and len(rows(plain)) == STEPS
    for prefix in ("model", "optimizer"):
        files = [TensorFiles(run / "checkpoints" / f"step-{STEPS:08d}", prefix) for run in (plain, profiled)]
        assert files[0].names() == files[1].names()
        assert all(files[0].get(name).equal(files[1].get(name)) for name in files[0].names())


def test_traces_of_each_start_have_its_steps(runs):
    plain, profiled, saved = runs
    assert FIRST + 2 <= saved < LAST and not (plain / "profile").exists()
    parts = [(FIRST, saved), (saved + 1, LAST)]
    names = {f"rank-00000.steps-{first}-{last}.trace.json.gz" for first, last in parts}
    assert {path.name for path in (profiled / "profile").iterdir()} == names
    for first, last in parts:
        steps, allocations = steps_of(profiled / "profile" / f"rank-00000.steps-{first}-{last}.trace.json.gz")
        assert steps == list(range(first, last + 1)) and allocations > 100


def profiler(folder, device="cpu", rank=0, **profile):
    config = config_from_dict({"output": str(folder), "steps": 9, "global_batch": 256, "profile": profile})
    return StepProfiler(config, Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device(device)))


def train(profiler, steps):
    for step in steps:
        profiler.begin(step)
        torch.zeros(8) + step
        profiler.end(step)
    profiler.close()


def test_only_the_named_ranks_are_profiled(tmp_path):
    for rank in (0, 1):
        train(profiler(tmp_path, rank=rank, steps=[2, 3], ranks=[1]), range(1, 10))
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank-00001.steps-2-3.trace.json.gz" and steps_of(path)[0] == [2, 3]


def test_steps_that_are_over_are_said_once(tmp_path, caplog):
    train(profiler(tmp_path, steps=[2, 3]), range(4, 10))
    assert caplog.text.count("profile.steps=[2, 3]: the run is already at step 4") == 1
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("")
    train(profiler(tmp_path, steps=[2, 3]), range(1, 10))
    assert "no profile of steps 2 to 3: " in caplog.text


def test_on_a_gpu_the_allocator_is_recorded(tmp_path, monkeypatch):
    """With a stand-in for the allocator's two functions."""
    recorded = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *a, **k: recorded.append((a, k)))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: open(path, "w").write("snapshot"))
    train(profiler(tmp_path, device="cuda", steps=[2, 3]), range(1, 10))
    assert (tmp_path / "profile" / "rank-00000.steps-2-3.memory.pickle").read_text() == "snapshot"
    (_, begin), (_, end) = recorded
    assert begin["max_entries"] > 0 and end == {"enabled": None}


@pytest.mark.gpu
def test_a_snapshot_of_a_real_gpu(tmp_path):
    profiled = profiler(tmp_path, device="cuda", steps=[1, 1])
    profiled.begin(1)
    torch.zeros(1 << 20, device="cuda")
    profiled.end(1)
    assert (tmp_path / "profile" / "rank-00000.steps-1-1.memory.pickle").stat().st_size > 1000


@pytest.mark.parametrize(
    "values, words",
    [
        ({"steps": [0, 3]}, "profile.steps=[0, 3]: needs 1 <= first <= last, such as [3, 5]"),
        ({"steps": [5, 3]}, "profile.steps=[5, 3]: needs 1 <= first <= last"),
        ({"steps": [5, 10]}, "profile.steps=[5, 10]: the run has only 9 steps"),
        ({"steps": [5]}, "profile.steps"),
        ({"steps": [1, 2], "ranks": []}, "profile.ranks=[]: name at least one rank"),
        ({"steps": [1, 2], "ranks": [-1]}, "profile.ranks=[-1]: name at least one rank"),
        ({"steps": [1, 2], "ranks": [0, 2]}, "profile.ranks=[0, 2]: the last rank of this run is 1"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, values, words):
    with pytest.raises(UserError) as error:
        profiler(tmp_path, **values)
    assert words in str(error.value) and "\n" not in str(error.value)
