"""The plan's peak memory beside the one a run measures: computed while the run starts, and logged once.

The plan is traced in a new process of lower priority on one core, which sees no GPU. It never waits for anything
of the run, and the run never waits for it: the line comes with the first row of metrics that finds the plan finished.
Whatever goes wrong with it is one line too.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mc2_hpc.config import RunConfig, config_from_dict, config_to_dict
from mc2_hpc.distributed import Ranks
from mc2_hpc.errors import UserError
from mc2_hpc.planning.captions import MEAN_TOKENS
from mc2_hpc.planning.processes import SECONDS
from mc2_hpc.training.launch import end_with_parent
from mc2_hpc.training.throughput import peak_memory

logger = logging.getLogger(__name__)

_GIB = 1 << 30


@contextmanager
def planned_peak(config: RunConfig, ranks: Ranks) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """Plan on the first rank, where ``log.planned_peak`` asks for it and the device counts its memory.

    Yields:
        What is to be called with every row of metrics; ``None`` if nothing is planned.
    """
    if not (config.log.planned_peak and ranks.is_first and peak_memory(ranks.device) is not None):
        yield None
        return
    try:
        process = _start(config, ranks)
    except OSError as error:
        logger.info("no planned peak of memory: %s", error)
        yield None
        return
    try:
        yield _Line(process)
    finally:
        process.kill()
        process.communicate()


def _start(config: RunConfig, ranks: Ranks) -> subprocess.Popen[str]:
    call = {"config": config_to_dict(config), "ranks": ranks.world_size, "device_type": ranks.device.type}
    with tempfile.TemporaryFile() as file:  # writing to a pipe could wait for the process
        file.write(json.dumps(call).encode())
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-m", "mc2_hpc.planning.planned_peak"],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
            start_new_session=True,  # a terminal's Ctrl-C is not for it
        )


class _Line:
    """Logs the line once."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._is_done = False

    def __call__(self, row: Mapping[str, Any]) -> None:
        if self._is_done or self._process.poll() is None:
            return
        self._is_done = True
        assert self._process.stdout is not None
        lines = self._process.stdout.read().splitlines()
        try:
            found = json.loads(lines[-1])
        except (IndexError, ValueError):
            late = self._process.returncode == -signal.SIGALRM
            reason = f"it takes more than {SECONDS:.0f} s" if late else f"exit code {self._process.returncode}"
            found = {"reason": reason}
        if "reason" in found:
            logger.info("no planned peak of memory: %s", found["reason"])
            return
        measured, planned = row["peak_memory_bytes"], found["bytes"]
        logger.info(
            "peak memory up to step %d: %.2f GiB measured, %.2f GiB planned (%+.1f%%)",
            row["step"],
            measured / _GIB,
            planned / _GIB,
            100 * (planned / measured - 1),
        )


def _plan() -> None:
    """The process: a config and the ranks as JSON on standard input; the peak, or why there is none, on its output."""
    end_with_parent()
    signal.alarm(round(SECONDS))
    os.nice(5)
    from mc2_hpc.planning import child  # noqa: F401  # first: it sets the process up
    from mc2_hpc.planning.plan import trace_drawn

    call = json.load(sys.stdin)
    config = config_from_dict(call.pop("config"))
    found: dict[str, object]
    try:
        found = {"bytes": trace_drawn(config, caption_tokens=MEAN_TOKENS, **call).peak.bytes}
    except UserError as error:
        found = {"reason": str(error)}
    except Exception as error:  # whatever it is, it is the plan's and not the run's
        found = {"reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(found))


if __name__ == "__main__":
    _plan()
