"""Traces at full size against what was counted on PyTorch's own CUDA allocator and launch path (docs/step.md)."""

import json
from pathlib import Path

import pytest

from mc2_hpc.config import config_from_dict
from mc2_hpc.planning.plan import trace_drawn
from mc2_hpc.planning.processes import in_processes

RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks/results/step_counts.json").read_text(encoding="utf-8"))
AFTER = {(row["ranks"], row["stage"]): row for row in RESULTS["rows"] if row["tree"] == "after"}
RECOMPUTE = {(row["recompute"], row["stage"]): row for row in RESULTS["recompute_rows"]}
PAIRS = RESULTS["config"]["pairs_per_rank"]
# ZeRO 3 on 384 ranks takes many minutes to trace (docs/planning.md).
CASES = [(384, 1, "full"), (384, 2, "full"), (1, 0, "full"), (1, 1, "full"), (1, 2, "full"), (1, 3, "full")]
CASES += [(384, 1, "none"), (384, 1, "selective"), (384, 2, "none"), (384, 2, "selective")]


def h14(ranks, stage, recompute):
    config = config_from_dict(
        {
            "global_batch": PAIRS * ranks,
            # Counted before layer norm and quick-GELU had kernels of their own.
            "model": {
                "preset": RESULTS["config"]["model"],
                "recompute": recompute,
                "norm": "torch",
                "activation": "torch",
            },
            "data": {"lanes": ranks},
            "zero": {"stage": stage},
        },
        "test",
    )
    tokens = RESULTS["config"]["caption_tokens"] / PAIRS
    call = {"config": config, "ranks": ranks, "caption_tokens": tokens, "device_type": "cuda"}
    (trace,) = in_processes(trace_drawn, [call])
    return trace


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks, stage, recompute", CASES)
def test_h14(ranks, stage, recompute):
    trace = h14(ranks, stage, recompute)
    row = AFTER[ranks, stage] if recompute == "full" else RECOMPUTE[recompute, stage]
    assert trace.peak.bytes / 2**30 == pytest.approx(row["peak_gib"], rel=0.1)
    assert trace.total(kernels="products").flops / 1e12 == pytest.approx(row["products_tflop"], rel=0.01)
    assert trace.total(kernels="other").bytes / 1e9 == pytest.approx(row["traffic_gb"], rel=0.1)
    if ranks > 1 and recompute == "full":
        for kind, key in (("all-reduce", "all_reduced_gb"), ("reduce-scatter", "reduce_scattered_gb")):
            size = sum(each.bytes for each in trace.collectives if each.kind == kind)
            assert size / 1e9 == pytest.approx(row[key], abs=0.01)
