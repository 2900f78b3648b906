"""``--slurm key=value key=value``: one grammar for every command that submits to Slurm, and safe script lines.

Options are separated by blanks or commas (``partition=cpu time=1:00:00``, ``partition=cpu,time=1:00:00``), the flag may
be repeated, and a later value wins. Keys are sbatch's long options, with ``_`` or ``-``, and a command's own. The shell
never runs any part of a value: values are quoted, and those that could start a new line are rejected.
"""

import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence

from mc2_hpc.errors import UserError

FLAGS = frozenset(
    "contiguous exclusive hold nice no-kill no-requeue overcommit oversubscribe reboot requeue spread-job "
    "use-min-nodes".split()
)
"""Options of sbatch that need no value; some may have one (``exclusive=user``)."""
OPTIONS = FLAGS | frozenset(
    "account acctg-freq batch bb begin cluster-constraint clusters comment constraint core-spec cores-per-socket "
    "cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution exclude extra-node-info gpu-bind "
    "gpu-freq gpus-per-socket gpus-per-task gres gres-flags hint job-name kill-on-invalid-dep licenses mail-type "
    "mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nodelist nodes ntasks-per-core "
    "ntasks-per-gpu ntasks-per-socket partition power prefer priority profile propagate qos reservation signal "
    "sockets-per-node switches thread-spec threads-per-core time time-min tmp wait-all-nodes wckey".split()
)
"""Options that are passed to sbatch. The scripts set the others themselves: arrays, files, the environment."""

Own = Mapping[str, int | None]
"""A command's own keys in addition to sbatch's: the minimum of each, or None for any text."""

FORM = "--slurm key=value key=value ... (or key=value,key=value), such as partition=cpu time=2:00:00"


def parse_slurm_options(words: Sequence[str], own: Own) -> dict[str, str]:
    """The options in the words of one or more ``--slurm``; a flag's value is empty.

    Raises:
        UserError: a part that is neither ``key=value`` nor a flag, an unknown key, or an invalid value.
    """
    options: dict[str, str] = {}
    for part in (part for word in words for part in _split(word)):
        key, equals, value = part.partition("=")
        key = key.replace("_", "-")
        if not equals and key not in FLAGS:
            raise UserError(
                f"--slurm {printable(part)}: write it as {FORM}; other arguments of the command come before --slurm"
            )
        if equals and not value:
            raise UserError(f"--slurm {printable(part)}: the value is empty; write it as {FORM}")
        check_option(key, value, own)
        options[key] = value
    return options


def _split(word: str) -> list[str]:
    """The parts of a word; a comma inside a value (``nodelist=n[1,3]``, ``partition=a,b``) is kept."""
    flags = "|".join(sorted(flag.replace("-", "[-_]") for flag in FLAGS))
    return re.split(rf",(?=[\w-]+=|(?:{flags})(?:,|$))", word)


def check_option(key: str, value: str, own: Own) -> None:
    """Raise a :class:`UserError` unless ``key`` (with ``-``) is an option that may have this value."""
    shown = printable(f"--slurm {key}={value}" if value else f"--slurm {key}")
    if key not in own and key not in OPTIONS:
        known = ", ".join((*own, *sorted(OPTIONS - own.keys())))
        raise UserError(f"{shown}: no such key; other arguments of the command come before --slurm; keys: {known}")
    check_text(f"--slurm {key}", value)
    least = own.get(key)
    if least is not None and not (re.fullmatch("[0-9]{1,9}", value) and int(value) >= least):
        raise UserError(f"{shown[:80]}: must be a whole number of at least {least}")


def check_text(what: str, text: str) -> None:
    """Raise a :class:`UserError` if ``text`` cannot be part of a line in a script: it has a control character, such as
    a line break, or bytes that are not UTF-8."""
    bad = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)
    if bad is not None:
        kind = "bytes that are not UTF-8" if unicodedata.category(bad) == "Cs" else "a line break or control character"
        raise UserError(f"{what}: '{printable(text)}' has {kind}, which a Slurm script cannot contain; remove it")


def printable(text: str) -> str:
    """``text`` as one line for a message."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def directive(name: str, value: str) -> str:
    """An ``#SBATCH`` line.

    Raises:
        UserError: see :func:`check_text`.
    """
    check_text(f"--{name}", value)
    return f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"
