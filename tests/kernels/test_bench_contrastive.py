"""The benchmark of the contrastive loss: what it derives from its rows, and that it runs."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_contrastive.py"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    spec = importlib.util.spec_from_file_location("bench_contrastive", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_contrastive", module)
    spec.loader.exec_module(module)
    return module


def test_ratios_are_larger_when_ours_is_faster_and_smaller_when_it_is_leaner(bench):
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
def test_a_small_batch_runs(bench):
    losses, missing = bench.contenders("cpu")
    rows = bench.measure(256, "cpu", losses, missing, rounds=1, ceiling=1.0)
    assert [row["loss"] for row in rows] == ["ours", "open_clip"]
    assert all(row["seconds"] > 0 and row["memory_mb"] > 0 for row in rows)
    assert missing == {}
