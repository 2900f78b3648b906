"""``mc2 status``."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mc2_hpc.cli.json_result import STDOUT, add_json_flag, write_result
from mc2_hpc.errors import UserError

if TYPE_CHECKING:
    from mc2_hpc.training.status import Status

SUMMARY = "show how runs are doing, from their files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run; several give a table"
    )
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    import dataclasses

    from mc2_hpc.training.status import read_status

    found: list[Status] = []
    failures = []
    for folder in arguments.runs:
        try:
            found.append(read_status(folder))
        except UserError as error:
            failures.append(error)
    if arguments.json:
        write_result([dataclasses.asdict(status) for status in found], arguments.json)
    if arguments.json != STDOUT:
        print("".join(line + "\n" for line in (_lines(found[0]) if len(found) == 1 else _table(found))), end="")
    for failure in failures:
        print(f"mc2: {failure}", file=sys.stderr)
    return 2 if failures else 0


def _lines(status: "Status") -> list[str]:
    """One run: a fact per line, wrapped."""
    from mc2_hpc.reading.files import shown
    from mc2_hpc.terminal import COLUMNS, clock

    facts = [("state", _state(status)), ("progress", _progress(status))]
    if status.recent is not None:
        recent = status.recent
        rate = f"{recent.samples_per_second:,.0f} pairs/s, {recent.data_wait:.0%} of the time waiting for data"
        facts.append(("rate", f"{rate}, loss {recent.loss:.4f}"))
    if status.eta_seconds is not None:
        facts.append(("ETA", f"{clock(status.eta_seconds)} at this rate"))
    if total := sum(status.skipped.values()):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in status.skipped.items())
        facts.append(("skipped", f"{total:,} samples ({total / (total + status.samples_seen):.2%}): {reasons}"))
    saved = status.checkpoint
    facts.append(("checkpoint", f"step {saved.step:,}, {clock(saved.age)} ago" if saved is not None else "none yet"))
    facts.append(("starts", _starts(status)))
    if status.error is not None:
        facts.append(("last error", _error(status)))
    facts += [("damaged", text) for text in status.unreadable]
    lines = [shown(status.run)]
    for name, text in facts:
        lines += (
            textwrap.wrap(text, COLUMNS, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13) if text else []
        )
    return lines


def _state(status: "Status") -> str:
    from mc2_hpc.terminal import clock

    alive = clock(status.sign_of_life_age)
    if status.state == "silent":
        return f"silent: nothing has changed for {alive}, so it was killed, or it is waiting for something"
    if status.state in ("starting", "running"):
        since = f" since {clock(status.start.age)}" if status.start.age is not None else ""
        return f"{status.state}{since}, last sign of life {alive} ago"
    age = f" {clock(status.state_age)} ago" if status.state_age is not None else ""
    return f"{status.state}{age}{': ' if status.message else ''}{status.message}"


def _progress(status: "Status") -> str:
    if status.step == 0:
        return f"no step logged yet{f', of {status.steps:,}' if status.steps else ''}"
    share = f" of {status.steps:,} ({status.step / status.steps:.1%})" if status.steps else ""
    return f"step {status.step:,}{share}, {status.samples_seen:,} pairs seen"


def _starts(status: "Status") -> str:
    from mc2_hpc.terminal import clock

    start = status.start
    parts = [f"{start.number:,}, the newest {clock(start.age or 0)} ago"] if start.number is not None else []
    parts += [f"{start.ranks:,} rank{'s' if start.ranks > 1 else ''}, the first on {start.host}"] if start.ranks else []
    if start.job is not None:
        again = f" ({start.job_starts:,} since its newest checkpoint)" if start.job_starts is not None else ""
        parts.append(f"Slurm job {start.job}{again}")
    return ", ".join(parts)


def _error(status: "Status") -> str:
    from mc2_hpc.terminal import clock

    error = status.error
    assert error is not None
    when = [f"{clock(error.age)} ago"] if error.age is not None else []
    when += ["before this start"] if error.before_this_start else []
    return f"{', '.join(when)}{': ' if when else ''}{error.text}"


_WIDTHS = (24, 8, 17, 9, 11, 4)


def _table(found: Sequence["Status"]) -> list[str]:
    """Several runs: a row each, then the errors of those that failed or are silent."""
    from mc2_hpc.reading.files import shown
    from mc2_hpc.terminal import COLUMNS, clock

    rows = [("RUN", "STATE", "STEP", "PAIRS/S", "ETA", "WAIT")]
    for status in found:
        recent, name = status.recent, shown(status.run)
        rows.append(
            (
                name if len(name) <= _WIDTHS[0] else f"...{name[3 - _WIDTHS[0] :]}",
                status.state,
                f"{status.step}/{status.steps or '?'}",
                f"{recent.samples_per_second:,.0f}" if recent is not None else "-",
                clock(status.eta_seconds) if status.eta_seconds is not None else "-",
                f"{recent.data_wait:.0%}" if recent is not None else "-",
            )
        )
    lines = [
        f"{name:<{_WIDTHS[0]}} {state:<{_WIDTHS[1]}}"
        + "".join(f" {cell:>{width}}" for cell, width in zip(rest, _WIDTHS[2:], strict=True))
        for name, state, *rest in (rows if found else [])
    ]
    for status in found:
        if status.error is not None and status.state in ("failed", "silent"):
            lines += textwrap.wrap(f"{shown(status.run)}: {_error(status)}", COLUMNS, subsequent_indent="  ")
    return lines
