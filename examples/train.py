"""Train from Python with a config file and overrides, then print the loss of each logged row.

    python examples/train.py CONFIG.yaml RUN_FOLDER [key.sub=value ...]

``mc2 train`` does the same, and also launches ranks and nodes and handles restarts.
"""

import json
import sys
from pathlib import Path

from mc2_hpc.config import load_config
from mc2_hpc.distributed import process_group
from mc2_hpc.training.run_folder import exclusive_run
from mc2_hpc.training.trainer import train_run


def main(config_file: str, output: str, *overrides: str) -> None:
    config = load_config(config_file, [f"output={output}", *overrides])
    with process_group() as ranks, exclusive_run(Path(config.output), ranks):
        train_run(config, ranks)
    rows = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        print(f"step {row['step']}: loss {row['loss']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
