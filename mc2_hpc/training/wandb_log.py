"""Rows of metrics for Weights & Biases, if ``log.wandb`` asks for them: an optional package that no run depends on.

A thread makes every call, so training waits for the start only (at most a minute) and for the last rows (likewise);
the network is the thread's concern. What goes wrong is one warning, and the run continues without. The entity, project
and mode are W&B's own environment variables: ``WANDB_PROJECT``, ``WANDB_MODE=offline`` (later: ``wandb sync``), ...
"""

import logging
import queue
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mc2_hpc.reading.files import read_text
from mc2_hpc.storage import write_text

logger = logging.getLogger(__name__)

START_S = 60.0
"""Longest wait for W&B to accept the run."""
END_S = 60.0
"""Longest wait for the last rows to be written or uploaded."""
_MOST_ROWS = 10_000
"""Rows that may wait for the network; more are left out."""


class WandbLog:
    """Sends rows to one W&B run, which a resumed run continues."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """Start a run, or continue that of the run ``folder``, in at most :data:`START_S` seconds.

        Args:
            config: settings of the run, to be shown beside it.
        """
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_ROWS)
        self._ready = threading.Event()
        self._works = True
        """False once a warning has said why there are no more rows."""
        self._thread = threading.Thread(target=self._run, args=(folder, config), name="wandb", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_S):
            self._give_up(f"it has not started within {START_S:.0f} s")

    def write(self, row: dict[str, float]) -> None:
        """Send a row: numbers by name, and its ``step``. Never waits."""
        if self._works:
            try:
                self._rows.put_nowait(row)
            except queue.Full:
                self._give_up(f"{_MOST_ROWS:,} rows are waiting to be sent")

    def close(self) -> None:
        """Send the rest, in at most :data:`END_S` seconds."""
        if self._works:
            try:
                self._rows.put_nowait(None)
            except queue.Full:
                return self._give_up(f"{_MOST_ROWS:,} rows are waiting to be sent")
            self._thread.join(END_S)
            if self._thread.is_alive():
                self._give_up(f"the last rows are not sent after {END_S:.0f} s")

    def _run(self, folder: Path, config: dict[str, Any]) -> None:
        """The thread: start, rows, end."""
        try:
            log, finish = _start(folder, config)
            self._ready.set()
            while self._works and (row := self._rows.get()) is not None:
                log(row)
            finish()
        except ImportError as error:
            self._give_up(f"{error}; pip install wandb")
        except BaseException as error:  # whatever the library raises; its SystemExit must not count either
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            self._ready.set()

    def _give_up(self, reason: str) -> None:
        if self._works:
            self._works = False
            logger.warning("no rows for Weights & Biases from here on: %s", reason)


def _start(folder: Path, config: dict[str, Any]) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    """Functions that log a row and end the run. Without an API key W&B raises an error instead of asking for it."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", init_timeout=START_S / 2, login_timeout=1)
    run = wandb.init(
        dir=str(folder),
        id=_run_id(folder),
        name=folder.resolve().name,
        resume="allow",
        config=config,
        settings=settings,
    )
    # A resumed run repeats steps, which W&B's own counter refuses.
    run.define_metric("*", step_metric="step")

    def finish() -> None:
        run.finish()
        wandb.teardown()  # its process may still be writing; a rank exits without the hook that waits for that

    return run.log, finish


def _run_id(folder: Path) -> str:
    """The id of the run's W&B run, the same for every start."""
    path = folder / "wandb" / "run-id"
    if path.exists():  # not the first start
        known = read_text(path, most=100).strip()
        if known.isalnum():
            return known
        logger.warning("%s: is not the id of a run; Weights & Biases gets another run", path)
    new = uuid.uuid4().hex[:12]
    write_text(path, new + "\n")
    return new
