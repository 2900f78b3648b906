"""``mc2 doctor``: which optional parts are here, whether they work, and what to install where they are not.

Self-checks run side by side in child processes, so that a library which crashes or hangs is reported like any other
failure. Those that take seconds run on request; in their place the package's own metadata are believed, and the finding
says that it is shallow.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from mc2_hpc.doctor.probes import PROBES, Missing

OK, MISSING, BROKEN = "ok", "missing", "broken"

PROCESS_S = 120
"""What a child gets for its self-checks. Imports from a cold network file system take their time."""
_COMMAND = (sys.executable, "-m", "mc2_hpc.doctor")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a probe found."""

    component: str
    status: str
    """``ok``, ``missing``, or ``broken`` (there, but its self-check failed)."""
    version: str
    detail: str
    """What the self-check did, or what to install."""
    shallow: bool = False
    """Whether it was not used, only found."""


def examine(*, full: bool = False) -> list[Finding]:
    """Look at every component; a probe that fails is reported as ``broken`` with its error, not raised.

    Args:
        full: also run the self-checks that take seconds.
    """
    groups: dict[str, list[str]] = {}
    for component, probe in PROBES.items():
        groups.setdefault(probe.process if full or not probe.slow else "", []).append(component)
    here = groups.pop("", [])
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        children = [pool.submit(_in_child, components) for components in groups.values()]
        findings = examine_here(here, full=full)
        for child in children:
            findings += child.result()
    return sorted(findings, key=lambda finding: list(PROBES).index(finding.component))


def examine_here(components: Iterable[str], *, full: bool) -> list[Finding]:
    """Look at some components, in this process."""
    return [_run(component, full=full) for component in components]


def _run(component: str, *, full: bool) -> Finding:
    probe = PROBES[component]
    shallow = probe.slow and not full
    found = ""
    try:
        found = probe.version()
        detail = "installed; `mc2 doctor --full` tries it" if shallow else probe.check()
    except Missing as missing:
        return Finding(component=component, status=MISSING, version="", detail=str(missing))
    except (Exception, SystemExit) as error:  # a probe may meet any failure of a foreign library: that is its report
        message = (str(error).strip().splitlines() or [""])[0]
        return Finding(component=component, status=BROKEN, version=found, detail=f"{type(error).__name__}: {message}")
    return Finding(component=component, status=OK, version=found, detail=detail, shallow=shallow)


def _in_child(components: Sequence[str]) -> list[Finding]:
    """Look at some components in a process of their own, in full."""
    try:
        done = subprocess.run([*_COMMAND, *components], capture_output=True, text=True, timeout=PROCESS_S)
        return [Finding(**row) for row in json.loads(done.stdout.splitlines()[-1])]
    except subprocess.TimeoutExpired:
        told = f"no answer within {PROCESS_S} s"
    except (IndexError, ValueError, TypeError):
        told = f"ended with {_how(done.returncode)}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return [Finding(component=name, status=BROKEN, version="", detail=told) for name in components]


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def to_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """JSON-ready rows."""
    return [asdict(finding) for finding in findings]
