"""Outputs for a run's metrics, all from the first rank: terminal, ``metrics.jsonl``, TensorBoard, W&B if asked."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from mc2_hpc.evaluation.results import leading_metric
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.storage import write_text
from mc2_hpc.terminal import COLUMNS, clock
from mc2_hpc.training.wandb_log import WandbLog

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

_MOST_BYTES = 4 << 30


class Means:
    """Means of per-step numbers over the steps since they were last taken."""

    def __init__(self) -> None:
        self._last_step = 0
        self._seen: dict[str, list[float]] = {}

    def add(self, step: int, **numbers: float) -> None:
        """Add the numbers of a step; a step that was already added is ignored."""
        if step <= self._last_step:
            return
        self._last_step = step
        for name, number in numbers.items():
            self._seen.setdefault(name, []).append(number)

    def take(self) -> dict[str, float]:
        """The means by name; resets them."""
        means = {name: math.fsum(numbers) / len(numbers) for name, numbers in self._seen.items()}
        self._seen = {}
        return means


class MetricsLog:
    """Rows of one run. A resumed run appends, after dropping rows of steps that will be trained again.

    A full disk does not end the run: rows wait in memory until there is room again, but TensorBoard's log ends.
    """

    def __init__(
        self, folder: Path, *, total_steps: int, first_step: int, wandb_config: dict[str, Any] | None = None
    ) -> None:
        """Open the log of a run that continues after ``first_step`` steps (0: a new run).

        Args:
            wandb_config: the run's settings if Weights & Biases gets its rows too.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._steps = _Rows(folder / "metrics.jsonl", last_step=first_step)
        self._evaluations = _Rows(folder / "evaluations.jsonl", last_step=first_step)
        self._board = _open_board(folder / "tensorboard", first_step)
        self._wandb = WandbLog(folder, wandb_config) if wandb_config is not None else None
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                TextColumn("ETA {task.fields[remaining]}"),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                BarColumn(bar_width=10),
                console=self._console,
            )
            self._task = self._progress.add_task(
                "train", total=total_steps, completed=first_step, note="", remaining="-"
            )
            self._progress.start()
        self._total_steps = total_steps

    def was_evaluated(self, step: int) -> bool:
        """Whether there is an evaluation row for that step."""
        return step in self._evaluations.steps

    def write_evaluation(self, row: dict[str, Any]) -> None:
        """Append an evaluation: its ``step``, and ``sets`` in the form of ``mc2_hpc.evaluation.suite.to_json``.

        TensorBoard gets ``eval/<set>/<metric>`` and, for each language, the set's leading metric.
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
        """Append one row; it must have ``step``. Nested dictionaries become tags ``key/subkey``."""
        self._steps.append(row)
        self._draw(row)
        if self._progress is not None:
            remaining, note = _remaining(row, self._total_steps), "  ".join(_notes(row))
            self._progress.update(self._task, completed=row["step"], note=note, remaining=remaining)
        else:
            print(progress_line(row, total_steps=self._total_steps), file=sys.stderr, flush=True)

    def _draw(self, row: dict[str, Any]) -> None:
        """Give the numbers of a row to TensorBoard and W&B."""
        numbers = _flat(row)
        if self._wandb is not None:
            self._wandb.write(numbers)
        if self._board is None:
            return
        try:
            for key, value in numbers.items():
                if key != "step":
                    self._board.add_scalar(key, value, row["step"])
        except OSError as error:  # from its writer thread, which has ended
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
                logger.error("TensorBoard's log is incomplete: %s", error)
        if self._wandb is not None:
            self._wandb.close()


def _flat(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by tag; ``key/subkey`` for those of nested dictionaries."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            numbers |= {f"{key}/{name}": number for name, number in value.items()}
        elif isinstance(value, int | float):
            numbers[key] = value
    return numbers


def progress_line(row: dict[str, Any], *, total_steps: int) -> str:
    """A row in at most 80 columns: step and remaining time first, then as much of the rest as fits."""
    line = f"step {row['step']}/{total_steps}  ETA {_remaining(row, total_steps)}"
    for note in _notes(row):
        if len(line) + 2 + len(note) > COLUMNS:
            break
        line += f"  {note}"
    return line


def _notes(row: dict[str, Any]) -> list[str]:
    """The parts of a row's line, most important first."""
    skipped = sum(row.get("skipped", {}).values())
    return [
        f"loss {row['loss']:.4f}",
        f"{row['samples_per_second']:,.0f}/s",
        f"wait {row['data_wait']:.0%}",
        *([f"skipped {skipped:,}"] if skipped else []),
        f"lr {row['lr']:.1e}",
        f"scale {row['logit_scale']:.1f}",
        f"norm {row['grad_norm']:.2f}",
        f"MFU {row['mfu']:.0%}",
    ]


def _remaining(row: dict[str, Any], total_steps: int) -> str:
    """Time to the last step at the row's speed."""
    return clock((total_steps - row["step"]) / max(row["steps_per_second"], 1e-9))


def _open_board(folder: Path, first_step: int) -> "SummaryWriter | None":
    """TensorBoard's writer, or ``None`` with a warning if it is not available: a run does not need it."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=first_step + 1)
    except ImportError as error:
        logger.warning("no TensorBoard log: %s; pip install tensorboard", error)
    except OSError as error:
        logger.warning("no TensorBoard log: %s: %s", folder, error)
    return None


def _step_of(line: str) -> int | None:
    """The step of a row; None if the line is not a row."""
    try:
        row = json.loads(line)  # accepts NaN, which some rows have
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None


class _Rows:
    """A file of JSON rows, one per line, each with a ``step``."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Open the file for appending, without its rows of steps beyond ``last_step``."""
        self._path = path
        self.steps: set[int] = set()
        """Steps that it has rows for."""
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
            logger.warning("%s: dropping %d lines that are not rows of a step", self._path, num_unreadable)
        write_text(self._path, "".join(line + "\n" for line in kept))

    def append(self, row: dict[str, Any]) -> None:
        self.steps.add(row["step"])
        self._unwritten += (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self._write()

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            logger.error("%s: %d bytes are waiting to be written: %s", self._path, len(self._unwritten), error)

    def close(self) -> None:
        self._write()
        self._file.close()
