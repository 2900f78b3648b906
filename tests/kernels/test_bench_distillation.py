"""The benchmark of the distilled loss: its peer computes the same gradients, its ratios, and that it runs."""

import pytest
import torch

from benchmarks import bench_distillation as bench
from mc2_hpc.kernels.contrastive import Teacher


def test_the_peer_has_the_same_gradients(kit):
    """open_clip's term is a cross entropy, which differs from the divergence by a constant."""
    student = [x.requires_grad_() for x in (*kit.features(40, 8, torch.float32), torch.tensor(2.0))]
    tensors = (*student, Teacher(*kit.features(40, 12, torch.float32, seed=1), scale=10.0))
    losses = bench.contenders()
    ours, theirs = (bench.both(losses[name], tensors)() for name in ("ours", bench.PEER))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_ratios_are_larger_when_ours_is_faster_and_smaller_when_it_is_leaner():
    rows = [
        {"loss": "ours", "batch": 8192, "seconds": 2.0, "memory_mb": 10.0},
        {"loss": "open_clip", "batch": 8192, "seconds": 3.0, "memory_mb": 100.0},
        {"loss": "alone", "batch": 8192, "seconds": 1.0, "memory_mb": 8.0},
    ]
    assert bench.ratios(rows) == {
        "speed_vs_open_clip_b8192": 1.5,
        "vs_open_clip_b8192_memory": 0.1,
        "speed_vs_alone_b8192": 0.5,
    }


@pytest.mark.slow
def test_a_small_batch_runs():
    rows = bench.measure(256, "cpu", rounds=1)
    assert [row["loss"] for row in rows] == ["ours", "open_clip", "alone"]
    assert all(row["seconds"] > 0 and row["memory_mb"] > 0 for row in rows)
