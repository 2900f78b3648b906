"""Trains 20 steps with the sigmoid loss at every ZeRO stage; writes each step's numbers and the final weights.

python -m torch.distributed.run --standalone --nproc-per-node 2 sigmoid_worker.py OUT [CASE ...]
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mc2_hpc.config import RunConfig
from mc2_hpc.distributed import process_group
from mc2_hpc.models import packed_captions
from tests.training import zero_worker

# (name, ZeRO stage, backward passes per step, loss.exchange)
CASES = [
    ("zero0", 0, 1, "ring"),
    ("zero1_gradcache", 1, 2, "all_gather"),
    ("zero2_gradcache", 2, 2, "ring"),
    ("zero3", 3, 1, "all_gather"),
]


def run_config(stage: int = 0, exchange: str = "all_gather") -> RunConfig:
    return zero_worker.run_config(stage, loss={"backend": "tiled", "kind": "sigmoid", "exchange": exchange})


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    packed_captions.LEAST_PLACES = 1  # these batches are too small for packing to pay
    rows = {}
    with process_group(timeout_s=120) as ranks:
        for name, stage, num_micro, exchange in CASES:
            if name not in names:
                continue
            config = run_config(stage, exchange)
            rows[name], weights = zero_worker.train(config, ranks, num_micro=num_micro, recompute="none", packed=True)
            if ranks.is_first:
                save_file(weights, out / f"{name}.safetensors")
        if ranks.is_first:
            (out / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
