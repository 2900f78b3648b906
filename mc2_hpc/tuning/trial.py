"""One trial: a few steps of ``mc2 train`` in fresh processes, and what their own files say about them.

<trial>/trial.yaml    the run's config with the trial's settings, its number of steps, and a profile of the last two
<trial>/run/          output of ``mc2 train``: metrics.jsonl, state.json, profile/
<trial>/train.log     of all ranks; on Slurm, <trial>/run/slurm-<job>.log

A trial saves, evaluates and sends nothing. Its steps are a warm-up, which fills the workers' queues, the measured ones,
and two under the profiler, which are not in the rate.
"""

import logging
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from mc2_hpc.config import RunConfig, config_to_dict, with_settings, yaml_text
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_tail, shown
from mc2_hpc.reading.json_file import Count, Foreign, parse_json
from mc2_hpc.storage import exclusive_folder, remove_folder, write_text
from mc2_hpc.training.launch import end_with_parent
from mc2_hpc.training.log_errors import last_error, newest_log
from mc2_hpc.training.run_state import read_state
from mc2_hpc.training.status import METRICS
from mc2_hpc.tuning.breakdown import Breakdown, read_profile, split_step
from mc2_hpc.tuning.record import Status, TrialResult
from mc2_hpc.tuning.space import Settings, name_of

logger = logging.getLogger(__name__)

_PROFILED = 2
_SETTLE = 2
"""Steps in which allocators, compilers and caches settle, besides those that empty the queues of the workers."""
_ROWS = 4
"""Of the measured steps."""
_MOST_RANKS = 8
"""That are profiled: those of the first node, so that none of them waits for another that is slowed down."""
_MOST_BYTES = 4 << 20
_POLL_S = 0.2
_STOP_S = 30
_FREE_S = 60
"""Longest wait for the processes of a trial that was killed."""

_OUT_OF_MEMORY = (
    *("OutOfMemoryError", "out of memory", "can't allocate memory", "Cannot allocate memory", "MemoryError"),
    *("OUT_OF_MEMORY", "oom-kill", "oom_kill"),
)
"""How CUDA, PyTorch's CPU allocator, the system, Python and Slurm say it."""
_KILLED, _BY_LAUNCHER = "was killed by SIGKILL", "killing ranks"
"""How a launcher reports a rank that the kernel killed, because it runs out of memory; and one that it ended itself."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is measured, and where."""

    key: str
    config: RunConfig
    """Of the run."""
    settings: Settings
    steps: int
    """Measured ones."""
    folder: Path
    ranks: int
    bound_s: float
    """Longest time for it."""

    @property
    def name(self) -> str:
        return name_of(self.settings)

    @property
    def run_config(self) -> RunConfig:
        """The config of the trial's own run."""
        config = with_settings(self.config, self.settings, "trial")
        every = max(1, self.steps // _ROWS)
        warmup = self.warmup
        steps = warmup + self.steps + _PROFILED
        measurement = {
            "output": str(self.folder / "run"),
            "steps": steps,
            "log_every": every,
            # The rate does not depend on them, and some need more steps.
            "optim.schedule": "constant",
            "optim.decay_steps": 0,
            "profile.steps": (steps - _PROFILED + 1, steps),
            "profile.ranks": list(range(min(self.ranks, _MOST_RANKS))),
            "checkpoint.every": steps + 1,
            "checkpoint.last": False,
            "checkpoint.resume": True,
            "eval": {},
            "log": {},
        }
        return with_settings(config, measurement, "trial")

    @property
    def warmup(self) -> int:
        """Steps before the measured ones: whole rows."""
        prefetch = int(self.settings.get("data.prefetch", self.config.data.prefetch))
        every = max(1, self.steps // _ROWS)
        return -(-(prefetch + _SETTLE) // every) * every

    @property
    def yaml(self) -> Path:
        return self.folder / "trial.yaml"

    @property
    def log(self) -> Path:
        """Of all ranks: what Slurm wrote, or else ours."""
        return newest_log(self.folder / "run") or self.folder / "train.log"

    def prepare(self) -> None:
        """Write the config in a new folder; what an earlier, killed attempt left there is removed."""
        if (self.folder / "run").is_dir():
            with exclusive_folder(self.folder / "run", wait_s=_FREE_S):  # its ranks may still be ending
                pass
        remove_folder(self.folder)
        write_text(self.yaml, yaml_text(config_to_dict(self.run_config)))


class Runner(Protocol):
    """Runs trials."""

    def run(self, trials: Sequence[Trial], report: Callable[[TrialResult], None], *, until: float) -> None:
        """Run the trials that can be run before ``until`` (of ``time.monotonic``), and report each result.

        A trial that only the end of that time cuts short has no result.
        """


@dataclass(frozen=True)
class LocalRunner:
    """Trials on this machine, one after the other."""

    def run(self, trials: Sequence[Trial], report: Callable[[TrialResult], None], *, until: float) -> None:
        for trial in trials:
            if time.monotonic() >= until:
                return
            trial.prepare()
            begin = time.monotonic()
            bound = min(begin + trial.bound_s, until)
            code = _train(trial, bound)
            seconds = time.monotonic() - begin
            if code is None and bound == until:
                return
            report(read_result(trial, seconds=seconds, timed_out=code is None))


def _train(trial: Trial, bound: float) -> int | None:
    """Run the trial's processes; returns their exit code, or None if they were stopped at ``bound``."""
    command = [sys.executable, "-m", "mc2_hpc.cli", "train", str(trial.yaml), "--processes", str(trial.ranks)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with open(trial.folder / "train.log", "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    try:
        while (code := process.poll()) is None:
            if time.monotonic() > bound:
                return None
            time.sleep(_POLL_S)
        return code
    finally:
        _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a launcher and its ranks, which have nothing to save."""
    if process.poll() is None:
        for _ in range(2):  # after the second Ctrl-C a launcher kills its ranks
            process.send_signal(signal.SIGINT)
            time.sleep(_POLL_S)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


_Rate = Annotated[float, msgspec.Meta(gt=0)]


class _Row(Foreign):
    step: Count
    samples_per_second: _Rate
    steps_per_second: _Rate
    data_wait: Annotated[float, msgspec.Meta(ge=0)]


def read_result(trial: Trial, *, seconds: float, timed_out: bool, words: str = "") -> TrialResult:
    """The result of a trial that has ended, from its files.

    Args:
        words: what a scheduler says about its end.
    """
    result = partial(
        TrialResult,
        key=trial.key,
        settings=dict(trial.settings),
        steps=trial.steps,
        seconds=seconds,
        log=os.path.relpath(trial.log, trial.folder.parents[1]),
    )
    if timed_out:
        return result(status="timeout", error=f"not done after {trial.bound_s:.0f} s")
    output = Path(trial.run_config.output)
    try:
        state = read_state(output) if output.is_dir() else None
        rows = _measured(trial, output)
    except UserError as error:
        return result(status="crash", error=str(error))
    if state is None or state.state != "finished":
        text = _error_of(trial, state.error.text if state is not None and state.error is not None else "", words)
        return result(status=_kind(trial, text), error=text)
    if not rows:
        return result(status="crash", error="it ended without rows of metrics")
    rates = [row.samples_per_second for row in rows]
    return result(
        status="ok",
        pairs_per_second=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
        waits=_waits(rows, output),
    )


def _measured(trial: Trial, output: Path) -> list[_Row]:
    path = output / METRICS
    lines = read_tail(path, most=_MOST_BYTES).splitlines() if path.is_file() else []
    rows = [parse_json(line, _Row, path) for line in lines]
    return [row for row in rows if trial.warmup < row.step <= trial.warmup + trial.steps]


def _waits(rows: Sequence[_Row], output: Path) -> Breakdown | None:
    """None, and a warning, if there is no whole profile: then nothing tells how the step divides."""
    path = next((output / "profile").glob("rank-00000.*.trace.json.gz"), None)
    if path is None:
        logger.warning("%s: the trial left no profile, so its step is not divided", shown(output))
        return None
    try:
        profile = read_profile(path)
    except UserError as error:
        logger.warning("%s; so the trial's step is not divided", error)
        return None
    seconds = 1 / statistics.median(row.steps_per_second for row in rows)
    return split_step(seconds, statistics.fmean(row.data_wait for row in rows), profile)


def _error_of(trial: Trial, recorded: str, words: str) -> str:
    """The run's own error, or else the last in its log."""
    logged = last_error(trial.log)
    return shown(recorded or (logged[0] if logged is not None else "") or words or "it ended without an error message")


def _kind(trial: Trial, error: str) -> Status:
    logged = read_tail(trial.log, most=_MOST_BYTES).decode("utf-8", "replace") if trial.log.is_file() else ""
    killed = _KILLED in logged and _BY_LAUNCHER not in logged
    return "out of memory" if killed or any(sign in error + logged for sign in _OUT_OF_MEMORY) else "crash"
