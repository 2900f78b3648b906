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
AFTER = {(row["ranks"], row["stage"]): row for row in RESULTS["rows"] if row["tree"] == "after"}
RECOMPUTE = {(row["recompute"], row["stage"]): row for row in RESULTS["recompute_rows"]}
PAIRS = RESULTS["config"]["pairs_per_rank"]
# ZeRO 3 on 384 ranks takes many minutes to trace (docs/planning.md).
CASES = [(384, 1, "full"), (384, 2, "full"), (1, 0, "full"), (1, 1, "full"), (1, 2, "full"), (1, 3, "full")]
CASES += [(384, 1, "none"), (384, 1, "selective"), (384, 2, "none"), (384, 2, "selective")]


def h14(ranks, stage, recompute, kernels="torch", tokens=RESULTS["config"]["caption_tokens"], **zero):
    config = config_from_dict(
        {
            "global_batch": PAIRS * ranks,
            # Most were counted before layer norm and quick-GELU had kernels of their own.
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
    call = {"config": config, "ranks": ranks, "caption_tokens": tokens / PAIRS, "device_type": "cuda"}
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", RESULTS["wire_rows"], ids=lambda row: f"zero{row['stage']}-{len(row['zero'])}")
def test_the_wire(row):
    tokens = RESULTS["config"]["caption_tokens_fused"]
    trace = h14(row["ranks"], row["stage"], row["recompute"], kernels="triton", tokens=tokens, **row["zero"])
    for kind, key in (
        ("all-reduce", "all_reduced_gb"),
        ("reduce-scatter", "reduce_scattered_gb"),
        ("all-gather", "gathered_gb"),
    ):
        size = sum(each.bytes for each in trace.collectives if each.kind == kind)
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
