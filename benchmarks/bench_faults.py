"""The fault matrix in fresh processes: what each fault costs in steps and in time until training is back where it was.

There is no peer: each run is compared with one that nothing happened to (``tests/faults/matrix.py``). Rows that need a
disk of their own need the right to mount a tmpfs; without it those rows are left out, and said to be.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import main
from tests.faults.matrix import CannotMount, Starter, prepare, run_row, run_undisturbed
from tests.faults.rows import EVERY, ROWS, STEPS
from tests.faults.tiny_run import BATCH, SAMPLES


def run(quick: bool) -> dict[str, Any]:
    """Rows of the matrix; ``quick``: one of them."""
    rows: list[dict[str, Any]] = []
    left_out = []
    starter = Starter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare(folder)
        undisturbed = run_undisturbed(config, folder / "undisturbed", starter)
        for number, row in enumerate(ROWS[2:3] if quick else ROWS):
            try:
                rows.append(run_row(row, config, folder / f"row{number}", starter, undisturbed))
            except CannotMount as error:
                left_out.append(f"{row.fault}: {error}")
                print(f"left out: {left_out[-1]}")
    plan = {"samples": SAMPLES, "global_batch": BATCH, "steps": STEPS, "checkpoint_every": EVERY, "ranks": 2}
    return {"config": {**plan, "left_out": left_out}, "rows": rows, "ratios": {}}


if __name__ == "__main__":
    main("faults", run)
