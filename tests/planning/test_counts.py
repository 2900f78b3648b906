"""Traces at full size against what was counted on PyTorch's own CUDA allocator and launch path (docs/step.md)."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.bench_plan import recipe
from mc2_hpc.config import config_from_dict
from mc2_hpc.planning.plan import trace_drawn
from mc2_hpc.planning.processes import in_processes

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "benchmarks/results/step_counts.json").read_text(encoding="utf-8"))
NOW = {(row["ranks"], row["stage"]): row for row in RESULTS["rows"] if row["tree"] == "now"}
BLOCKS = {(row["kernels_of_blocks"], row["recompute"], row["stage"]): row for row in RESULTS["fused_rows"]}
PAIRS = RESULTS["config"]["pairs_per_rank"]
# ZeRO 3 on 384 ranks takes many minutes to trace (docs/planning.md).
CASES = [(1, stage, "full", "triton") for stage in (0, 1, 2, 3)]
CASES += [(384, stage, recompute, "triton") for stage in (1, 2) for recompute in ("none", "selective", "full")]
CASES += [(384, 1, recompute, "torch") for recompute in ("none", "selective", "full")]


def h14(ranks, stage, recompute, kernels="triton", **zero):
    config = config_from_dict(
        {
            "global_batch": PAIRS * ranks,
            "model": {
                "preset": RESULTS["config"]["model"],
                "recompute": recompute,
                "norm": kernels,
                "activation": kernels,
            },
            "data": {"lanes": ranks},
            "zero": {"stage": stage, **zero},
        },
        "test",
    )
    tokens = RESULTS["config"]["caption_tokens"] / PAIRS
    call = {"config": config, "ranks": ranks, "per_node": 8, "caption_tokens": tokens, "device_type": "cuda"}
    (trace,) = in_processes(trace_drawn, [call])
    return trace


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks, stage, recompute, kernels", CASES)
def test_h14(ranks, stage, recompute, kernels):
    trace = h14(ranks, stage, recompute, kernels)
    row = BLOCKS[kernels, recompute, stage] if ranks > 1 else NOW[ranks, stage]
    assert trace.peak.bytes / 2**30 == pytest.approx(row["peak_gib"], rel=0.1)
    assert trace.total(kernels="products").flops / 1e12 == pytest.approx(row["products_tflop"], rel=0.01)
    assert trace.total(kernels="other").bytes / 1e9 == pytest.approx(row["traffic_gb"], rel=0.1)
    if ranks > 1 and recompute == "full":
        for kind, key in (("all-reduce", "all_reduced_gb"), ("reduce-scatter", "reduce_scattered_gb")):
            size = sum(each.bytes for each in trace.collectives if each.kind == kind)
            assert size / 1e9 == pytest.approx(NOW[ranks, stage][key], abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", RESULTS["wire_rows"], ids=lambda row: f"zero{row['stage']}-{len(row['zero'])}")
def test_the_wire(row):
    trace = h14(row["ranks"], row["stage"], row["recompute"], **row["zero"])
    for kind, key in (
        ("all-reduce", "all_reduced_gb"),
        ("reduce-scatter", "reduce_scattered_gb"),
        ("all-gather", "gathered_gb"),
    ):
        size = sum(each.bytes for each in trace.collectives if each.kind == kind)
        assert size / 1e9 == pytest.approx(row[key], abs=0.01)
    for group, key in (("node", "exchanged_gb"), ("between", "exchanged_between_nodes_gb")):
        size = sum(each.bytes for each in trace.collectives if each.group == group)
        assert size / 1e9 == pytest.approx(row[key], abs=0.01)
    assert trace.peak.bytes / 2**30 == pytest.approx(row["peak_gib"], rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_recipe():
    """The table of docs/planning.md, and its distance from what a paper says."""
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    rows = recipe()
    for row in rows:
        shown = re.search(rf"^\| {row['gpu']} \| ([\d.]+) \| ([\d.]+) \| ([\d,]+) \|$", page, flags=re.M)
        step, days, hours = (float(text.replace(",", "")) for text in shown.groups())
        assert step == pytest.approx(row["predicted_step_seconds"], abs=0.006)
        assert days == pytest.approx(row["predicted_days"], abs=0.06)
        assert hours == pytest.approx(row["predicted_gpu_hours_per_billion_pairs"], abs=0.6)
    papers = rows[0]["papers_gpu_hours_per_billion_pairs"]
    assert f"{papers:,.0f} GPU hours per 10^9" in page
    assert 0.45 < rows[0]["predicted_gpu_hours_per_billion_pairs"] / papers < 0.55  # "half"
