"""The fault matrix in fresh processes: steps lost to each fault, and the time until training is back where it was.

There is no peer: each run is compared with an undisturbed one (``tests/faults/matrix.py``). Rows that need a separate
disk require permission to mount a tmpfs; without it those rows are left out and reported.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import main
from tests.faults.matrix import CannotMount, Starter, prepare, run_row, run_undisturbed
from tests.faults.rows import EVERY, ROWS, STEPS
from tests.faults.tiny_run import BATCH, SAMPLES


def run(quick: bool) -> dict[str, Any]:
    """Rows of the matrix; ``quick`` runs only one."""
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
