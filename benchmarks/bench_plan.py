"""How far a plan is from real steps on this machine's CPU: peak memory, flops and bytes of collectives.

    mc2 bench plan [--quick] [--json FILE]

A row is one setting of a tiny model on one rank: ZeRO stage, recomputation and micro-batches. The peer is the step:
its peak is what PyTorch's CPU allocator reports, its flops are FlopCounterMode's, and its collectives are counted as it
sends them. Ratios are the largest relative errors of all rows; they are errors, so smaller is better, unlike other
benchmarks' ratios.
"""

import itertools
import time
from typing import Any

from benchmarks.harness import main
from mc2_hpc.planning.processes import in_processes
from tests.planning.real_step import real, tiny_config, traced

CASES = list(itertools.product((1, 2, 4), (0, 1, 2, 3), ("none", "selective", "full"), (0, 3)))
"""Size of the model, ZeRO stage, recomputation, micro-batch."""
QUICK = [(1, 1, "none", 0), (1, 3, "full", 3)]


def run(quick: bool) -> dict[str, Any]:
    """Rows of all settings (``quick``: two), and the largest errors."""
    rows = []
    for size, stage, recompute, micro_batch in QUICK if quick else CASES:
        config = tiny_config(size=size, zero={"stage": stage}, model={"recompute": recompute}, micro_batch=micro_batch)
        (found,) = in_processes(real, [{"config": config}])
        start = time.perf_counter()
        (trace,) = in_processes(traced, [{"config": config, "world_size": 1}])
        rows.append(
            {
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
    errors = ("peak_error", "flops_error", "collective_bytes_error")
    return {"config": {"ranks": 1}, "rows": rows, "ratios": {name: max(row[name] for row in rows) for name in errors}}


def _error(planned: float, real: float) -> float:
    return abs(planned - real) / real


if __name__ == "__main__":
    main("plan", run)
