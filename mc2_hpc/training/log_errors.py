"""The last error in the log files of a run: what srun, Slurm, a rank or ``mc2`` wrote before it ended."""

import re
from pathlib import Path

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_tail, shown

_MOST_BYTES = 256 << 10
_LONGEST = 1000
_LABEL = re.compile(r"^\s*\d+: ")
"""Of a rank, from ``srun --label``."""
_ERROR = re.compile(
    r"mc2: (?P<mc2>.+)"
    r"|\d\d:\d\d:\d\d E (?P<logged>.+)"
    r"|(?P<slurm>(?:srun|slurmstepd)[\w-]*: error: .+)"
    r"|(?P<raised>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b.*)"
)
"""``raised``: the last line of a traceback."""
_NO_ERROR = re.compile(
    r"job \d+, start \d+ on |the run is done|exit code \d+|SIG[A-Z0-9]+(?: before the first step)?: |saving because of "
    r"|a signal to another rank: "
)
"""Lines of ``mc2`` that are not errors: starts, ends, signals."""
_START = re.compile(r"mc2: job \d+, start \d+ on ")


def newest_log(folder: Path) -> Path | None:
    """The ``*.log`` in a run's folder that changed last."""
    logs = []
    for path in folder.glob("*.log"):
        try:
            logs.append((path.stat().st_mtime, path))
        except OSError:
            continue  # removed meanwhile
    return max(logs)[1] if logs else None


def last_error(log: Path) -> tuple[str, bool] | None:
    """The last error in the last 256 KiB of a log, in one line, and whether it is of the log's last start.

    Returns ``None`` if there is none, or the file cannot be read.
    """
    try:
        text = read_tail(log, most=_MOST_BYTES).decode("utf-8", "replace")
    except UserError:
        return None
    found: tuple[str, bool] | None = None
    for line in text.splitlines():
        line = _LABEL.sub("", line).strip()
        if _START.match(line):
            found = (found[0], False) if found is not None else None
        elif (match := _ERROR.match(line)) and not (match["mc2"] and _NO_ERROR.match(match["mc2"])):
            # srun's own lines follow from an error of a rank.
            if match["slurm"] is None or found is None or not found[1]:
                error = match["mc2"] or match["logged"] or match["slurm"] or match["raised"]
                found = (shown(error)[:_LONGEST], True)
    return found
