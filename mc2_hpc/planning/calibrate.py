"""Fits what a machine achieves of its peaks to steps that runs have measured.

A run's rows say how long its steps took, its newest checkpoint which settings and how many ranks it had, and a trace
what such a step computes. All fractions of the peaks move together, and as far apart as the runs can tell: one run
alone cannot say whether products or memory made it slower. A least-squares fit of the logarithms of step times does
both: deviations of single fractions are held back, the common factor is free.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc2_hpc.config import RunConfig, config_from_dict, yaml_text
from mc2_hpc.errors import UserError
from mc2_hpc.planning.machines import Gpu, Network
from mc2_hpc.planning.plan import trace_drawn
from mc2_hpc.planning.predict import predict_step
from mc2_hpc.planning.processes import in_processes
from mc2_hpc.planning.records import StepTrace
from mc2_hpc.reading.files import read_tail, shown
from mc2_hpc.reading.json_file import Foreign, Size, parse_json, read_json
from mc2_hpc.storage import write_text
from mc2_hpc.training.checkpoint_folders import TRAINER, complete_folders

_MOST_BYTES = 256 << 10
_FEWEST_ROWS = 3
_TOLERANCE, _FREEDOM = 0.02, 0.5
"""Standard deviations, of logarithms: of a measured step, and of one fraction from the others' change."""
_ROUNDS = 100


class _Row(Foreign):
    """The columns of a row of ``metrics.jsonl`` that are used."""

    steps_per_second: float
    data_wait: float
    caption_tokens: float


class _Trainer(Foreign):
    """What ``trainer.json`` says about the run."""

    config: dict[str, Any]
    world_size: Size


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The steps of one run."""

    path: Path
    """Of its rows."""
    config: RunConfig
    ranks: int
    seconds: float
    """Of a step, without waiting for data, saves and evaluations: the median over rows."""
    caption_tokens: float
    """Mean of its captions, with begin and end."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The machine with fractions that fit the runs."""

    gpu: Gpu
    network: Network
    network_seen: bool
    """Whether a run had several ranks."""
    predicted: Sequence[float]
    """Seconds of each run's step, with these fractions."""


def read_measured(path: Path) -> Measured:
    """The steps that ``<output>/metrics.jsonl`` measured.

    Raises:
        UserError: too few rows, or no checkpoint beside them that says what the run was.
    """
    lines = read_tail(path, most=_MOST_BYTES).split(b"\n")[:-1]
    rows = [parse_json(line, _Row, path, what="rows of `mc2 train`") for line in lines[1:]]  # the first row warms up
    rows = [row for row in rows if row.steps_per_second > 0 and row.data_wait < 1]
    if len(rows) < _FEWEST_ROWS:
        raise UserError(
            f"{shown(path)}: {len(rows)} rows after the first, which warms up: at least {_FEWEST_ROWS} are needed; "
            f"train longer, or set log_every lower"
        )
    checkpoints = complete_folders(path.parent / "checkpoints")
    if not checkpoints:
        raise UserError(f"{shown(path)}: no checkpoint beside it says the run's settings; its last step saves one")
    file = checkpoints[-1] / TRAINER
    trainer = read_json(file, _Trainer)
    config = config_from_dict(trainer.config, str(file))
    if config.stages:
        raise UserError(
            f"{shown(path)}: a run of several stages, whose steps differ: calibrate with one without stages"
        )
    return Measured(
        path=path,
        config=config,
        ranks=trainer.world_size,
        seconds=statistics.median((1 - row.data_wait) / row.steps_per_second for row in rows),
        caption_tokens=statistics.fmean(row.caption_tokens for row in rows),
    )


def trace_measured(runs: Sequence[Measured], device_type: str, *, per_node: int) -> list[StepTrace]:
    """Traces of the runs' steps, with captions as long as theirs.

    Raises:
        UserError, TraceError: as :func:`mc2_hpc.planning.plan.make_plans`.
    """
    calls = [
        {
            "config": run.config,
            "ranks": run.ranks,
            "per_node": per_node,
            "caption_tokens": run.caption_tokens,
            "device_type": device_type,
        }
        for run in runs
    ]
    return in_processes(trace_drawn, calls)


def calibrate(
    runs: Sequence[Measured], traces: Sequence[StepTrace], gpu: Gpu, network: Network, *, per_node: int
) -> Calibration:
    """Fit the fractions of ``gpu`` and, if a run had several ranks, of ``network``.

    Raises:
        UserError: a run is faster than the peaks allow.
    """
    network_seen = any(run.ranks > 1 for run in runs)

    def machine(shifts: npt.NDArray[np.float64]) -> tuple[Gpu, Network]:
        common, products, memory, links = np.exp(shifts).tolist()
        return dataclasses.replace(
            gpu,
            products=min(1.0, gpu.products * common * products),
            attention=min(1.0, gpu.attention * common * products),
            memory=min(1.0, gpu.memory * common * memory),
        ), dataclasses.replace(network, achieved=min(1.0, network.achieved * links))

    def predicted(shifts: npt.NDArray[np.float64]) -> list[float]:
        fitted, links = machine(shifts)
        return [
            predict_step(trace, run.config, fitted, links, per_node=per_node).seconds
            for run, trace in zip(runs, traces, strict=True)
        ]

    def residuals(shifts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        found = [
            math.log(seconds / run.seconds) / _TOLERANCE for seconds, run in zip(predicted(shifts), runs, strict=True)
        ]
        return np.array([*found, *(shifts[1:] / _FREEDOM)])

    shifts = _least_squares(residuals, np.zeros(4))
    fitted, links = machine(shifts)
    for name, fraction in (("products", fitted.products), ("memory", fitted.memory), ("network", links.achieved)):
        if fraction == 1:
            raise UserError(
                f"the measured steps need more than the peak of {name}: name the device of the runs with --gpu and "
                f"--network"
            )
    seconds = predicted(shifts)
    source = "; ".join(
        f"{shown(run.path.resolve())} on {run.ranks} ranks: {run.seconds:.4g} s a step, fitted {fit:.4g} s"
        for run, fit in zip(runs, seconds, strict=True)
    )
    return Calibration(
        gpu=dataclasses.replace(fitted, fractions_source=f"fitted to {source}"),
        network=dataclasses.replace(links, achieved_source=f"fitted to {source}") if network_seen else network,
        network_seen=network_seen,
        predicted=seconds,
    )


def _least_squares(
    residuals: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]], start: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Gauss-Newton from ``start``, with numerical derivatives and limited steps."""
    point, width = start, 1e-5
    for _ in range(_ROUNDS):
        here = residuals(point)
        slopes = np.stack([(residuals(point + width * axis) - here) / width for axis in np.eye(len(point))], axis=1)
        change = np.clip(np.linalg.lstsq(slopes, -here, rcond=None)[0], -0.5, 0.5)
        point = point + change
        if np.abs(change).max() < 1e-6:
            break
    return point


def write_machine(path: Path, machine: Gpu | Network) -> None:
    """Write the file that ``--gpu`` or ``--network`` reads."""
    write_text(path, yaml_text(dataclasses.asdict(machine)))
