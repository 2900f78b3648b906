"""The plan's peak memory beside the one a run measures: computed while the run starts, and logged once.

The plan is traced in a new process of lower priority on one core, which sees no GPU. It never waits for anything
of the run, and the run never waits for it: the line comes with the first row of metrics that finds the plan finished.
Whatever goes wrong with it is one line too. Of a run with stages, the one that it begins with is planned.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mc2_hpc.config import RunConfig, config_from_dict, config_to_dict
from mc2_hpc.config_stages import RunStage, stage_after
from mc2_hpc.distributed import Ranks
from mc2_hpc.errors import UserError, first_line
from mc2_hpc.planning.captions import MEAN_TOKENS
from mc2_hpc.planning.processes import SECONDS
from mc2_hpc.reading.json_file import File, Size, parse_json
from mc2_hpc.training.checkpoint_folders import complete_folders, step_of
from mc2_hpc.training.launch import end_with_parent
from mc2_hpc.training.throughput import peak_memory

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_MOST_BYTES = 1 << 20
_END_S = 10
"""Longest wait for the process to end."""


@contextmanager
def planned_peak(config: RunConfig, ranks: Ranks) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """Plan on the first rank, where ``log.planned_peak`` asks for it and the device counts its memory.

    Yields:
        What is to be called with every row of metrics; ``None`` if nothing is planned.
    """
    if not (config.log.planned_peak and ranks.is_first and peak_memory(ranks.device) is not None):
        yield None
        return
    with ExitStack() as stack:
        line = None
        try:
            stage = _due(config)
            answer = stack.enter_context(tempfile.TemporaryFile())
            process = _start(stage.config, ranks, answer)
        except OSError as error:
            logger.info("no planned peak of memory: %s", error)
        else:
            stack.callback(_end, process)
            line = _Line(process, answer, last_step=stage.end)
        yield line


def _due(config: RunConfig) -> RunStage[RunConfig]:
    """The stage that the run begins or continues with."""
    newest = complete_folders(Path(config.output) / "checkpoints")[-1:] if config.checkpoint.resume else []
    return stage_after(config, step_of(newest[0]) if newest else 0)


def _start(config: RunConfig, ranks: Ranks, answer: IO[bytes]) -> "subprocess.Popen[bytes]":
    call = {
        "config": config_to_dict(config),
        "ranks": ranks.world_size,
        "per_node": ranks.per_node,
        "device_type": ranks.device.type,
    }
    with tempfile.TemporaryFile() as file:  # a pipe could fill, or stay open in a process of the process
        file.write(json.dumps({"parent": os.getpid(), **call}).encode())
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-m", "mc2_hpc.planning.planned_peak"],
            stdin=file,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
            start_new_session=True,  # a terminal's Ctrl-C is not for it
        )


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process if it is still running. One that the kernel does not let die yet is not waited for long."""
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)


class _Answer(File):
    """What the process prints: one of the two."""

    bytes: Size | None = None
    """At the peak."""
    reason: str = ""
    """Why there is no plan."""


class _Line:
    """Logs the line once."""

    def __init__(self, process: "subprocess.Popen[bytes]", answer: IO[bytes], *, last_step: int) -> None:
        """
        Args:
            last_step: of the stage that is planned; the peak of another's rows is not compared.
        """
        self._process = process
        self._answer = answer
        self._last_step = last_step
        self._is_done = False

    def __call__(self, row: Mapping[str, Any]) -> None:
        if self._is_done or self._process.poll() is None:
            return
        self._is_done = True
        if row["step"] > self._last_step:
            logger.info("no planned peak of memory: the stage ended at step %d, before its plan", self._last_step)
            return
        found = self._read()
        if found.bytes is None:
            logger.info("no planned peak of memory: %s", found.reason)
            return
        measured = row["peak_memory_bytes"]
        logger.info(
            "peak memory up to step %d: %.2f GiB measured, %.2f GiB planned (%+.1f%%)",
            row["step"],
            measured / _GIB,
            found.bytes / _GIB,
            100 * (found.bytes / measured - 1),
        )

    def _read(self) -> _Answer:
        self._answer.seek(0)
        *_, last = [b"", *self._answer.read(_MOST_BYTES).splitlines()]
        try:
            return parse_json(last, _Answer, "the plan")
        except UserError:
            late = self._process.returncode == -signal.SIGALRM
            reason = f"it takes more than {SECONDS:.0f} s" if late else f"exit code {self._process.returncode}"
            return _Answer(reason=reason)


def _plan() -> None:
    """The process: a config and the ranks as JSON on standard input; the peak, or why there is none, on its output."""
    signal.alarm(round(SECONDS))
    call = json.load(sys.stdin)
    end_with_parent()
    if os.getppid() != call.pop("parent"):
        return  # it ended before
    os.nice(5)
    from mc2_hpc.planning import child  # noqa: F401  # first: it sets the process up
    from mc2_hpc.planning.plan import trace_drawn

    config = config_from_dict(call.pop("config"))
    found: dict[str, object]
    try:
        found = {"bytes": trace_drawn(config, caption_tokens=MEAN_TOKENS, **call).peak.bytes}
    except UserError as error:
        found = {"reason": str(error)}
    except Exception as error:  # whatever it is, it is the plan's and not the run's
        found = {"reason": f"{type(error).__name__}: {first_line(error)}"}
    print(json.dumps(found))


if __name__ == "__main__":
    _plan()
