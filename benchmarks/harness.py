"""Shared by all benchmarks: the machine's description, alternating timing, the command line and the result JSON.

A benchmark module has ``run(quick) -> dict`` with ``name``, ``config``, ``rows`` and ``ratios``. Ratios compare ours
with the peer in the same run; larger is better unless the name ends in ``_memory``.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch

from mc2_hpc.cli.json_result import STDOUT, add_json_flag, write_result

ROOT = Path(__file__).parents[1]
"""The folder in which ``python -m benchmarks.<module>`` works."""
RESULTS = ROOT / "benchmarks" / "results"
_STARTED = time.perf_counter()
_NOT_ROWS = ":(exclude)benchmarks/results"


def environment() -> dict[str, Any]:
    """Machine, versions and commit: without them a figure is meaningless."""
    cuda = torch.cuda.is_available()
    return {
        "machine": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit(),
    }


def commit() -> str | None:
    """The checked-out commit, with ``-dirty`` if tracked files other than result rows differ from it."""
    name = _output(["git", "-C", str(ROOT), "describe", "--always"])
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".", _NOT_ROWS])
    return f"{name}-dirty" if name and changed else name


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def alternate(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender's calls, alternating (A B A B ...) so that a slow phase of the machine affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name, call in contenders.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def announce(text: str) -> None:
    """Say on stderr what begins, with the time since the start of the program."""
    print(f"{time.perf_counter() - _STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


def announced(text: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call, announced each time."""

    def announcing() -> object:
        announce(text)
        return call()

    return announcing


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def own_command(file: str) -> list[str]:
    """The command that runs a benchmark's ``__file__`` in :data:`ROOT`, for measurements in a separate process."""
    return [sys.executable, "-m", f"benchmarks.{Path(file).stem}"]


def peak_memory(file: str, name: str, batch: int, device: str, call: Callable[[], object]) -> int:
    """Peak memory of a call in bytes, without its inputs.

    On a CPU the benchmark ``file`` prints it in a separate process: ``--peak-memory NAME BATCH THREADS``.

    Raises:
        RuntimeError: (for example ``OutOfMemoryError``) the call does not run.
    """
    if device == "cpu":
        command = [*own_command(file), "--peak-memory", name, str(batch), str(torch.get_num_threads())]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=1800).stdout)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        call()
        return torch.cuda.max_memory_allocated() - before
    finally:
        torch.cuda.empty_cache()


def print_peak_memory(call_of: Callable[[int], Callable[[], object]], batch: int, threads: int) -> None:
    """Print the peak growth of the resident set during the call for a batch size; only in a separate process."""
    torch.set_num_threads(threads)
    call_of(64)()  # lets libraries initialise
    call = call_of(batch)
    print(resident_growth(call))


def resident_growth(call: Callable[[], object]) -> int:
    """Peak growth of this process's resident set during the call, in bytes; only meaningful in a separate process."""
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory can only be measured on Linux")


def spread(samples: list[float]) -> dict[str, float]:
    """Median, smallest and largest of raw samples."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


class Rows(list[dict[str, Any]]):
    """The rows of a run. Each is in the result file as soon as it is added, so a run that is cut short keeps them."""

    write: Callable[[list[dict[str, Any]]], None] | None = None
    """Set by :func:`main` where there is a result file."""

    def append(self, row: dict[str, Any]) -> None:
        self.extend([row])

    def extend(self, rows: Iterable[dict[str, Any]]) -> None:
        super().extend(rows)
        if Rows.write is not None:
            Rows.write(list(self))

    def __iadd__(self, rows: Iterable[dict[str, Any]]) -> Self:  # type: ignore[override,misc]
        self.extend(rows)
        return self


def main(name: str, run: Callable[[bool], dict[str, Any]]) -> None:
    """Command line of a benchmark: ``[--quick] [--json FILE]``; prints rows and ratios."""
    parser = argparse.ArgumentParser(prog=f"mc2 bench {name}")
    parser.add_argument("--quick", action="store_true", help="smoke test in under a minute; do not quote its numbers")
    add_json_flag(parser)
    arguments = parser.parse_args()
    env = environment()
    if arguments.json and str(env["commit"]).endswith("-dirty") and not arguments.quick:
        print(f"mc2 bench: the commit of this row is {env['commit']}: commit first to keep the row", file=sys.stderr)
    about = {"name": name, "env": env, "quick": arguments.quick}
    if arguments.json and arguments.json != STDOUT:
        Rows.write = lambda rows: write_result({**about, "unfinished": True, "rows": rows}, arguments.json)
    result = {**about, **run(arguments.quick)}
    for row in result["rows"] if arguments.json != STDOUT else ():
        print("  ".join(f"{k}={_short(v)}" for k, v in row.items() if not isinstance(v, list)))
    for key, value in result["ratios"].items() if arguments.json != STDOUT else ():
        print(f"{key}: {value:.2f}")
    if arguments.json:
        write_result(result, arguments.json)
    sys.stdout.flush()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
