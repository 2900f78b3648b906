"""Where the numbers of a run go: the terminal, ``metrics.jsonl`` and TensorBoard, all from the first rank."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mc2_hpc.storage import atomic_path

logger = logging.getLogger(__name__)


class MetricsLog:
    """Rows of one run. A resumed run appends; rows of steps that will be trained again are dropped first.

    A full disk ends no run: rows wait in memory until there is room again, TensorBoard's copy of them ends.
    """

    def __init__(self, folder: Path, *, total_steps: int, first_step: int) -> None:
        """Open the log of a run that continues after ``first_step`` steps (0: a new run)."""
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._keep_rows_up_to(first_step)
        self._file = open(self.path, "ab", buffering=0)
        self._unwritten = b""
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

    def _keep_rows_up_to(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the torn last line of a killed run
            if row["step"] <= step:
                kept.append(line)
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it must have ``step``. Nested dictionaries become TensorBoard tags ``key/subkey``."""
        self._append(json.dumps(row, ensure_ascii=False) + "\n")
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

    def _append(self, line: str) -> None:
        self._unwritten += line.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            logger.error("%s: %d bytes wait to be written: %s", self.path, len(self._unwritten), error)

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
        if self._unwritten:
            self._append("")
        self._file.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                logger.error("TensorBoard's log is not whole: %s", error)
