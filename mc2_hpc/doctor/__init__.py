"""``mc2 doctor``: which optional parts are installed, whether they work, and what to install if they are missing.

Self-checks run concurrently in child processes, so a library that crashes or hangs is reported like any other failure.
Slow self-checks only run on request; otherwise the package metadata is trusted, and the finding is marked as shallow.
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
"""Time limit of a child for its self-checks. Imports from a cold network file system are slow."""
_COMMAND = (sys.executable, "-m", "mc2_hpc.doctor")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a probe found."""

    component: str
    status: str
    """``ok``, ``missing``, or ``broken`` (installed, but its self-check failed)."""
    version: str
    detail: str
    """What the self-check did, or what to install."""
    shallow: bool = False
    """Whether the component was only found, not used."""


def examine(*, full: bool = False) -> list[Finding]:
    """Examine every component; a probe that fails is reported as ``broken`` with its error, not raised.

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
    """Examine some components in this process."""
    return [_run(component, full=full) for component in components]


def _run(component: str, *, full: bool) -> Finding:
    probe = PROBES[component]
    shallow = probe.slow and not full
    found = ""
    try:
        found = probe.version()
        detail = "installed; `mc2 doctor --full` tests it" if shallow else probe.check()
    except Missing as missing:
        return Finding(component=component, status=MISSING, version="", detail=str(missing))
    except (Exception, SystemExit) as error:  # a third-party library may fail in any way, and that is the finding
        message = (str(error).strip().splitlines() or [""])[0]
        return Finding(component=component, status=BROKEN, version=found, detail=f"{type(error).__name__}: {message}")
    return Finding(component=component, status=OK, version=found, detail=detail, shallow=shallow)


def _in_child(components: Sequence[str]) -> list[Finding]:
    """Examine some components in a separate process, in full."""
    try:
        done = subprocess.run([*_COMMAND, *components], capture_output=True, text=True, timeout=PROCESS_S)
        return [Finding(**row) for row in json.loads(done.stdout.splitlines()[-1])]
    except subprocess.TimeoutExpired:
        detail = f"no answer within {PROCESS_S} s"
    except (IndexError, ValueError, TypeError):
        detail = f"ended with {_how(done.returncode)}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return [Finding(component=name, status=BROKEN, version="", detail=detail) for name in components]


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def to_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """JSON-ready rows."""
    return [asdict(finding) for finding in findings]
