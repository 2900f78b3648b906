"""Traces on fake tensors against real steps: peak memory, flops, and the bytes of every collective."""

import itertools
import json

import pytest

from mc2_hpc.planning.processes import in_processes
from tests.planning import real_step
from tests.planning.real_step import tiny_config, traced

CASES = list(itertools.product((0, 1, 2, 3), ("none", "selective", "full"), (0, 3)))
FAST = [(0, "none", 0), (1, "full", 3), (2, "selective", 0), (3, "none", 3), (3, "full", 0)]


def compare(**values):
    """A real step on one rank and its trace."""
    config = tiny_config(**values)
    (found,) = in_processes(real_step.real, [{"config": config}])
    (trace,) = in_processes(traced, [{"config": config, "world_size": 1}])
    return found, trace


def check(found, trace):
    assert trace.peak.bytes == pytest.approx(found["peak"], rel=0.05)
    assert trace.executed_flops == pytest.approx(found["flops"], rel=0.01)
    assert max(trace.timeline, key=lambda moment: moment.bytes) == trace.peak


@pytest.mark.parametrize("stage, recompute, micro_batch", FAST)
def test_one_rank(stage, recompute, micro_batch):
    check(*compare(zero={"stage": stage}, model={"recompute": recompute}, micro_batch=micro_batch))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("stage, recompute, micro_batch", CASES)
def test_one_rank_at_three_sizes(stage, recompute, micro_batch, size):
    check(*compare(size=size, zero={"stage": stage}, model={"recompute": recompute}, micro_batch=micro_batch))


def on_ranks(ranks_of, folder, world_size, **values):
    """Real steps on gloo ranks; returns rank 0's."""
    (folder / "cases.json").write_text(json.dumps({"world_size": world_size, **values}))
    ranks_of(world_size, real_step.__file__, folder)
    return json.loads((folder / "rank0.json").read_text())


def check_ranks(ranks_of, folder, world_size, **values):
    found = on_ranks(ranks_of, folder, world_size, **values)
    config = tiny_config(world_size=world_size, **values)
    (trace,) = in_processes(traced, [{"config": config, "world_size": world_size}])
    assert sorted([c.kind, c.calls, c.bytes] for c in trace.collectives) == found["collectives"]
    assert trace.peak.bytes == pytest.approx(found["peak"], rel=0.05)


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks(ranks_of, tmp_path, stage):
    check_ranks(ranks_of, tmp_path, 2, zero={"stage": stage})


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(
    "values",
    [
        {"zero": {"stage": 0}, "model": {"embedding": "dense"}},
        {"zero": {"stage": 2}, "micro_batch": 3},
        {"zero": {"stage": 3}, "model": {"recompute": "full"}, "micro_batch": 3},
        {"zero": {"stage": 1}, "loss": {"exchange": "ring"}},
        {"zero": {"stage": 1}, "optim": {"grad_clip": 1.0}},
    ],
)
def test_more_ranks(ranks_of, tmp_path, world_size, values):
    check_ranks(ranks_of, tmp_path, world_size, **values)
