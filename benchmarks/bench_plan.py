"""How far a plan is from real steps on this machine's CPU, and what it says about the recipe's run.

    mc2 bench plan [--quick] [--json FILE]

Rows with ``what``

- ``trace``: one setting of a tiny model on one rank: ZeRO stage, recomputation and micro-batches. The peer is the step:
  its peak is what PyTorch's CPU allocator reports, its flops are FlopCounterMode's, and its collectives are counted as
  it sends them.
- ``calibrated``: ``mc2 train`` with one setting gives the fractions of ``--calibrate``, and the step of every other
  setting of the model is predicted with them. The peer is the step that ``mc2 train`` then measures. One thread.
- ``recipe``: the days that ViT-H/14's run of the paper would take on each GPU of the table: 384 GPUs, 29.4 billion
  pairs. The papers do not say which GPUs those were or how long the run took; their nearest figure is in the row.

Ratios are the largest relative errors of all rows; they are errors, so smaller is better, unlike other benchmarks'
ratios. ``calibrated_step_error`` is that of the settings that were not fitted.
"""

import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, main
from mc2_hpc.config import load_config
from mc2_hpc.planning.calibrate import Measured, calibrate, read_measured, trace_measured
from mc2_hpc.planning.machines import read_gpu, read_network
from mc2_hpc.planning.plan import Assumptions, Plan, make_plans
from mc2_hpc.planning.predict import predict_step
from mc2_hpc.planning.processes import in_processes
from tests.faults.tiny_run import TinyPool, write_config, write_pool
from tests.planning.real_step import real, tiny_config, traced

CASES = list(itertools.product((1, 2, 4), (0, 1, 2, 3), ("none", "selective", "full"), (0, 3)))
"""Size of the model, ZeRO stage, recomputation, micro-batch."""
QUICK = [(1, 1, "none", 0), (1, 3, "full", 3)]
BASE = {"layers": 4, "global_batch": 64, "micro_batch": 0}
"""What the fractions are fitted to."""
OTHERS = [{"micro_batch": 16}, {"global_batch": 128}, {"global_batch": 32}, {"layers": 8}, {"layers": 2}]
QUICK_BASE, QUICK_OTHERS = {"layers": 1, "global_batch": 16, "micro_batch": 0}, [{"micro_batch": 8}]
STEPS, LOG_EVERY = {False: 18, True: 8}, {False: 3, True: 2}
RECIPE = "configs/train/vit_h14_worldwide.yaml"
RECIPE_GPUS = 384
PAPERS = "ViT-H/14, a week on 256 A100 for 12.8 billion pairs of English (MetaCLIP, arXiv 2309.16671)"
PAPERS_DAYS, PAPERS_GPUS, PAPERS_PAIRS = 7, 256, 12.8e9


def run(quick: bool) -> dict[str, Any]:
    """Rows of all settings (``quick``: a few), and the largest errors."""
    traces = _traces(QUICK if quick else CASES)
    calibrated = _calibrated(quick)
    errors = ("peak_error", "flops_error", "collective_bytes_error")
    ratios = {name: max(row[name] for row in traces) for name in errors}
    ratios["calibrated_step_error"] = max(row["step_error"] for row in calibrated if not row["fitted"])
    every = [*traces, *calibrated, *([] if quick else recipe())]
    return {"config": {"ranks": 1, "steps": STEPS[quick]}, "rows": every, "ratios": ratios}


def _traces(cases: list[tuple[int, int, str, int]]) -> list[dict[str, Any]]:
    rows = []
    for size, stage, recompute, micro_batch in cases:
        config = tiny_config(size=size, zero={"stage": stage}, model={"recompute": recompute}, micro_batch=micro_batch)
        (found,) = in_processes(real, [{"config": config}])
        start = time.perf_counter()
        (trace,) = in_processes(traced, [{"config": config, "world_size": 1}])
        rows.append(
            {
                "what": "trace",
                "size": size,
                "stage": stage,
                "recompute": recompute,
                "micro_batch": micro_batch,
                "peak_error": _error(trace.peak.bytes, found["peak"]),
                "flops_error": _error(trace.executed_flops, found["flops"]),
                "collective_bytes_error": _error(
                    sum(each.bytes for each in trace.collectives), sum(size for _, _, size in found["collectives"])
                ),
                "trace_seconds": time.perf_counter() - start,
            }
        )
    return rows


def _calibrated(quick: bool) -> list[dict[str, Any]]:
    base, others = (QUICK_BASE, QUICK_OTHERS) if quick else (BASE, OTHERS)
    settings = [base, *({**base, **other} for other in others)]
    with tempfile.TemporaryDirectory() as name:
        pool = write_pool(Path(name))
        runs = [_train(Path(name) / str(number), pool, each, quick) for number, each in enumerate(settings)]
    gpu = read_gpu("cpu")
    network = read_network(gpu.network)
    steps = trace_measured(runs, gpu.device, per_node=8)
    fitted = calibrate(runs[:1], steps[:1], gpu, network, per_node=8)
    rows = []
    for setting, measured, step in zip(settings, runs, steps, strict=True):
        predicted = predict_step(step, measured.config, fitted.gpu, fitted.network, per_node=8).seconds
        rows.append(
            {
                "what": "calibrated",
                **setting,
                "fitted": setting is base,
                "step_seconds": measured.seconds,
                "predicted_seconds": predicted,
                "step_error": _error(predicted, measured.seconds),
            }
        )
    return rows


def _train(folder: Path, pool: TinyPool, setting: dict[str, int], quick: bool) -> Measured:
    """A run of one rank and one thread, by the command."""
    folder.mkdir()
    image_size, width = (32, 64) if quick else (64, 192)
    vision = {"image_size": image_size, "patch_size": 8, "width": width, "layers": setting["layers"], "head_width": 32}
    text = {"vocab_size": pool.vocab_size, "context_length": 24, "width": width // 2, "heads": 4}
    config = write_config(
        folder / "run.yaml",
        pool,
        output=str(folder / "run"),
        steps=STEPS[quick],
        log_every=LOG_EVERY[quick],
        global_batch=setting["global_batch"],
        micro_batch=setting["micro_batch"],
        model={
            "preset": "ViT-S-16-worldwide",
            "embed_dim": 64,
            "vision": vision,
            "text": {**text, "layers": setting["layers"]},
        },
    )
    command = [sys.executable, "-m", "mc2_hpc.cli", "train", str(config)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800
    )
    if done.returncode:
        raise RuntimeError(f"mc2 train failed: {done.stderr[-2000:]}")
    return read_measured(folder / "run" / "metrics.jsonl")


def recipe() -> list[dict[str, Any]]:
    """Rows of the recipe's run, which take a minute: one trace, and no step that is timed."""
    config = load_config(ROOT / RECIPE)
    first = read_gpu("a100")
    ((plan,), _) = make_plans(
        [config],
        gpus=RECIPE_GPUS,
        per_node=8,
        gpu_name="a100",
        gpu=first,
        network_name=first.network,
        network=read_network(first.network),
        assumptions=Assumptions(),
    )
    return [_recipe_row(plan, name) for name in ("a100", "h100", "h200", "b200")]


def _recipe_row(plan: Plan, name: str) -> dict[str, Any]:
    """The same trace on another GPU."""
    gpu = read_gpu(name)
    network = read_network(gpu.network)
    step = predict_step(plan.trace, plan.config, gpu, network, per_node=plan.per_node)
    there = dataclasses.replace(plan, gpu_name=name, gpu=gpu, network_name=gpu.network, network=network, step=step)
    pairs = plan.config.steps * plan.config.global_batch
    return {
        "what": "recipe",
        "config": RECIPE,
        "gpus": plan.gpus,
        "gpu": name,
        "pairs": pairs,
        "predicted_step_seconds": step.seconds,
        "predicted_days": there.days / there.goodput,
        "predicted_gpu_hours": there.gpu_hours,
        "peak_bytes": plan.trace.peak.bytes,
        "fits": there.fits,
        "papers": PAPERS,
        "papers_gpu_hours_per_billion_pairs": PAPERS_DAYS * 24 * PAPERS_GPUS / PAPERS_PAIRS * 1e9,
        "predicted_gpu_hours_per_billion_pairs": there.gpu_hours / pairs * 1e9,
    }


def _error(planned: float, real: float) -> float:
    return abs(planned - real) / real


if __name__ == "__main__":
    main("plan", run)
