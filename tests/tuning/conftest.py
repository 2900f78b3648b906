"""A tiny run, a machine of two ranks, and a runner that answers from a table in place of processes."""

from collections.abc import Callable

import pytest

from mc2_hpc.config import RunConfig, load_config
from mc2_hpc.tuning.breakdown import Breakdown
from mc2_hpc.tuning.machines import Machine
from mc2_hpc.tuning.record import TrialResult
from mc2_hpc.tuning.trial import Trial

WAITS = Breakdown(data=0.1, host=0.1, compute=0.6, network=0.2)


@pytest.fixture
def config(module_config) -> RunConfig:
    return load_config(module_config)


@pytest.fixture
def machine() -> Machine:
    return Machine(
        device_type="cpu",
        name="test",
        ranks=2,
        ranks_per_node=2,
        cores=4,
        memory_bytes=1 << 40,
        can_compile=True,
    )


class TableRunner:
    """Results by settings and steps: a rate, or a status with an error."""

    def __init__(self, answer: Callable[[Trial], float | tuple[str, str]]) -> None:
        self._answer = answer
        self.ran: list[Trial] = []

    def run(self, trials, report, *, until):
        for trial in trials:
            self.ran.append(trial)
            report(result_of(trial, self._answer(trial)))


def result_of(trial: Trial, answer: float | tuple[str, str]) -> TrialResult:
    common = {"key": trial.key, "settings": dict(trial.settings), "steps": trial.steps, "seconds": 10.0, "log": "log"}
    if isinstance(answer, tuple):
        return TrialResult(status=answer[0], error=answer[1], **common)
    waits = Breakdown(data=10 / answer, host=10 / answer, compute=60 / answer, network=20 / answer)
    return TrialResult(
        status="ok", pairs_per_second=answer, slowest=0.9 * answer, fastest=1.1 * answer, waits=waits, **common
    )
