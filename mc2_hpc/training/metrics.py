"""Where the numbers of a run go: the terminal, ``metrics.jsonl`` and TensorBoard, all from the first rank."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mc2_hpc.evaluation.results import leading_metric
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.storage import atomic_path

logger = logging.getLogger(__name__)

_MOST_BYTES = 4 << 30


class MetricsLog:
    """Rows of one run. A resumed run appends; rows of steps that will be trained again are dropped first.

    A full disk ends no run: rows wait in memory until there is room again, TensorBoard's copy of them ends.
    """

    def __init__(self, folder: Path, *, total_steps: int, first_step: int) -> None:
        """Open the log of a run that continues after ``first_step`` steps (0: a new run)."""
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._steps = _Rows(folder / "metrics.jsonl", last_step=first_step)
        self._evaluations = _Rows(folder / "evaluations.jsonl", last_step=first_step)
        self._board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("train", total=total_steps, completed=first_step, note="")
            self._progress.start()
        self._total_steps = total_steps

    def was_evaluated(self, step: int) -> bool:
        """Whether there is an evaluation's row of that step."""
        return step in self._evaluations.steps

    def write_evaluation(self, row: dict[str, Any]) -> None:
        """Append an evaluation: its ``step``, and ``sets`` as ``mc2_hpc.evaluation.suite.to_json`` has them.

        TensorBoard gets ``eval/<set>/<metric>``, and by language the metric that the set is ordered by.
        """
        self._evaluations.append(row)
        scalars: dict[str, float] = {}
        for name, entry in row["sets"].items():
            for metric, value in {**entry.get("mean", {}), **entry.get("embedding_mean", {})}.items():
                scalars[f"eval/{name}/{metric}"] = value
            for group, numbers in entry.get("groups", {}).items():
                leading = leading_metric(numbers)
                scalars[f"eval_by_group/{name}_{leading}/{group}"] = numbers[leading]
        self._draw({"step": row["step"], **scalars})

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it must have ``step``. Nested dictionaries become TensorBoard tags ``key/subkey``."""
        self._steps.append(row)
        self._draw(row)
        step = row["step"]
        skipped = sum(row.get("skipped", {}).values())
        note = (
            f"loss {row['loss']:.4f}  scale {row['logit_scale']:.3f}  lr {row['lr']:.2e}  norm {row['grad_norm']:.3f}  "
            f"{row['samples_per_second']:,.0f}/s  MFU {row['mfu']:.1%}  wait {row['data_wait']:.1%}"
            + (f"  skipped {skipped:,}" if skipped else "")
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=step, note=note)
        else:
            remaining = (self._total_steps - step) / max(row["steps_per_second"], 1e-9)
            print(f"step {step}/{self._total_steps}  {note}  ETA {remaining:,.0f} s", file=sys.stderr, flush=True)

    def _draw(self, row: dict[str, Any]) -> None:
        if self._board is None:
            return
        try:
            for key, value in row.items():
                if isinstance(value, dict):
                    for name, number in value.items():
                        self._board.add_scalar(f"{key}/{name}", number, row["step"])
                elif isinstance(value, int | float) and key != "step":
                    self._board.add_scalar(key, value, row["step"])
        except OSError as error:  # of its writing thread, which is over with it
            logger.error("TensorBoard's log ends at step %d: %s", row["step"], error)
            self._board = None

    def close(self) -> None:
        """Flush and close all outputs."""
        if self._progress is not None:
            self._progress.stop()
        self._steps.close()
        self._evaluations.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                logger.error("TensorBoard's log is not whole: %s", error)


def _step_of(line: str) -> int | None:
    """The step of a row; None where the line is no row."""
    try:
        row = json.loads(line)  # which reads NaN, as some rows have
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None


class _Rows:
    """A file of JSON rows, one a line, each of a ``step``."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Open the file to append to, without its rows of steps beyond ``last_step``."""
        self._path = path
        self.steps: set[int] = set()
        """Those it has rows of."""
        if path.exists():
            self._drop_beyond(last_step)
        self._file = open(path, "ab", buffering=0)
        self._unwritten = b""

    def _drop_beyond(self, step: int) -> None:
        kept, num_unreadable = [], 0
        for line in read_bytes(self._path, most=_MOST_BYTES).decode("utf-8", "replace").splitlines():
            found = _step_of(line)
            if found is None:
                num_unreadable += 1
            elif found <= step:
                kept.append(line)
                self.steps.add(found)
        if num_unreadable > 1:  # one is the torn last line of a killed run
            logger.warning("%s: %d lines are no rows of a step; they are left out", self._path, num_unreadable)
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        self.steps.add(row["step"])
        self._unwritten += (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self._write()

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            logger.error("%s: %d bytes wait to be written: %s", self._path, len(self._unwritten), error)

    def close(self) -> None:
        self._write()
        self._file.close()
