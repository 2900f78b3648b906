"""The example that trains from Python prints the losses that the run logged."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train.py"


def test_train(module_config, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLE, module_config, tmp_path / "run", "steps=4"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert done.stdout.splitlines() == [f"step {row['step']}: loss {row['loss']:.3f}" for row in rows]
