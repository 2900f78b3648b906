"""Text for terminals: logs, durations, and the progress of long jobs (a bar on a terminal, plain lines elsewhere)."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, int, int, str], None]
"""Called as ``report(stage, done, total, name of what was just done)``; a total of 0 means not known yet."""

COLUMNS = 80
"""Width of lines that are written to a file."""

_LINE_EVERY_S = 10.0


def log_to_stderr() -> None:
    """Log this process's messages as a command does: our own from INFO, other libraries' from WARNING."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("mc2_hpc").setLevel(logging.INFO)  # the parent of all our loggers


def clock(seconds: float) -> str:
    """A duration such as ``1:01:03`` or ``4d 18:19:56``."""
    days, rest = divmod(round(seconds), 86_400)
    text = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text


@contextmanager
def progress() -> Iterator[Report]:
    """Yield a :data:`Report` that shows each stage on standard error."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int, name: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None, name="", rate="")
            speed = next(task.speed for task in bars.tasks if task.id == tasks[stage])
            rate = f"{speed:,.1f}/s" if speed else ""
            bars.update(tasks[stage], completed=done, total=total or None, name=name, rate=rate)

        yield report


def _lines() -> Report:
    begun: dict[str, float] = {}
    shown: dict[str, float] = {}

    def report(stage: str, done: int, total: int, name: str) -> None:
        now = time.monotonic()
        begun.setdefault(stage, now)
        if (done < total or not total) and now - shown.get(stage, -_LINE_EVERY_S) < _LINE_EVERY_S:
            return
        shown[stage] = now
        elapsed = now - begun[stage]
        line = f"{stage}: {done}" + (f"/{total}" if total else "")
        if done and elapsed > 0:
            line += f", {done / elapsed:,.1f}/s"
            line += f", ETA {(total - done) * elapsed / done:,.0f} s" if total else ""
        print(line, file=sys.stderr, flush=True)

    return report
