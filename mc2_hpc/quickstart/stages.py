"""Named stages with a bar or a plain line each, and their durations."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Update = Callable[[int, int], None]
"""Called with (done, total)."""


class Stages:
    """Runs ``total`` stages one after the other and stores their seconds in ``times``."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        self.times: dict[str, float] = {}
        self._total = total
        self._console = console or Console(stderr=True)

    @contextmanager
    def stage(self, name: str, *, bar: bool = True) -> Iterator[Update]:
        """Time one stage. On a terminal it shows a bar, unless the stage itself draws one (``bar=False``)."""
        label = f"[{len(self.times) + 1}/{self._total}] {name}"
        start = time.perf_counter()
        if bar and self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            with Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True) as progress:
                task = progress.add_task(_plain(label), total=None)
                yield lambda done, total: progress.update(task, completed=done, total=total)
        else:
            self._console.print(label, markup=False, highlight=False)
            yield lambda done, total: None
        self.times[name] = time.perf_counter() - start
        self._console.print(f"{label}: {self.times[name]:.1f} s", markup=False, highlight=False)


def _plain(label: str) -> str:
    """Escape ``label`` for rich's markup, which uses square brackets."""
    return label.replace("[", r"\[")
