"""The benchmark of the contrastive loss: the ratios of its rows, and that it runs."""

import pytest
import torch

from benchmarks import bench_contrastive as bench


def test_ratios_are_larger_when_ours_is_faster_and_smaller_when_it_is_leaner():
    rows = [
        {"loss": "ours", "batch": 8192, "seconds": 2.0, "memory_mb": 10.0, "fraction_of_matmul": 0.9},
        {"loss": "open_clip", "batch": 8192, "seconds": 3.0, "memory_mb": 100.0, "fraction_of_matmul": 0.6},
        {"loss": "ours", "batch": 16384, "seconds": 8.0, "memory_mb": 20.0, "fraction_of_matmul": 0.9},
    ]
    assert bench.ratios(rows) == {
        "speed_vs_open_clip_b8192": 1.5,
        "vs_open_clip_b8192_memory": 0.1,
        "fraction_of_matmul_peak_b8192": 0.9,
        "fraction_of_matmul_peak_b16384": 0.9,
    }


@pytest.mark.slow
def test_a_small_batch_runs():
    losses, missing = bench.contenders("cpu")
    rows = bench.measure(256, "cpu", losses, missing, rounds=1, ceiling=1.0)
    assert [row["loss"] for row in rows] == ["ours", "open_clip", "ours_sigmoid", "open_clip_sigmoid"]
    assert all(row["seconds"] > 0 and row["memory_mb"] > 0 for row in rows)
    assert missing == dict.fromkeys(("inf_cl", "memeff", "siglip_kernel"), "needs CUDA")


def test_both_sides_of_the_sigmoid_loss_compute_the_same():
    losses, _ = bench.contenders("cpu")
    tensors = bench.inputs(64, "cpu")
    ours, theirs = (losses[name](*tensors) for name in ("ours_sigmoid", "open_clip_sigmoid"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
