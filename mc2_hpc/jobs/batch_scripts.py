"""The shipped batch scripts (``slurm/*.sbatch``): fill in their header, and submit them."""

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.slurm_options import check_text, directive

GPUS = "gpus-per-node"
"""sbatch's name of what ``--slurm`` calls ``gpus``."""
_SUBMIT_S = 120


def scripts_folder() -> Path:
    """Folder of the batch scripts: inside an installed package, next to it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed, checkout = package / "slurm_scripts", package.parent / "slurm"
    return installed if installed.is_dir() else checkout


def check_gpus(options: Mapping[str, str]) -> None:
    """Raise a :class:`UserError` unless ``--slurm`` requests GPUs at most once, in the form ``gpus=4``, ``gpus=a100:4``
    (per node) or ``gres=gpu:4``."""
    if "gpus" in options and not re.fullmatch(r"([\w.-]+:)?[0-9]{1,6}", options["gpus"], flags=re.ASCII):
        raise UserError(
            f"--slurm gpus={options['gpus']}: must be a whole number per node, with or without a type: gpus=4, "
            "gpus=a100:4"
        )
    asked = [f"{key}={options[key]}" for key in ("gpus", "gres") if key in options and num_gpus(key, options[key])]
    asked += [f"{key}={options[key]}" for key in ("gpus-per-task", "gpus-per-socket") if key in options]
    if len(asked) > 1 or any(word.startswith("gpus-per") for word in asked):
        raise UserError(f"--slurm {' '.join(asked)}: request GPUs once, with gpus=N (per node) or gres=gpu:N")


def num_gpus(key: str, value: str) -> int:
    """GPUs per node in a value of ``gpus`` (``a100:4``) or of sbatch's ``gres`` (``gpu:a100:4,nvme:1``)."""
    if key == "gpus":
        return int(value.rpartition(":")[2])
    total = 0
    for request in re.sub(r"\([^)]*\)", "", value).split(","):
        name, *rest = request.removeprefix("gres/").replace("=", ":").split(":")
        if name == "gpu":
            count = rest[-1] if rest else "1"
            total += int(count) if re.fullmatch("[0-9]{1,6}", count) else 1  # a type alone is one
    return total


def header_of(script: str) -> dict[str, str]:
    """The script's ``#SBATCH --name=value`` lines."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, flags=re.MULTILINE))


def fill_in(script: str, values: Mapping[str, str], arguments: Sequence[str], *, environment: str | None) -> str:
    """The text of a batch script with its header's ``values`` and its ``arguments`` filled in.

    Args:
        environment: the file to source before Python starts; ``None``: the shipped ``env.sh``.

    Raises:
        UserError: there is no such environment file, or something contains a line break.
    """
    path = Path(environment or scripts_folder() / "env.sh").resolve()
    if not path.is_file():
        raise UserError(f"--slurm env={path}: no such file")
    check_text("--slurm env", str(path))
    exports = {"MC2_SLURM": scripts_folder(), "MC2_ENV": path, "MC2_PYTHON": sys.executable}
    filling = [f"export {name}={shlex.quote(str(value))}" for name, value in exports.items()]
    return _with_header(script, values, [*filling, f"set -- {shlex.join(arguments)}"])


def _with_header(script: str, values: Mapping[str, str], after: Sequence[str]) -> str:
    """``script`` with its ``#SBATCH --name=value`` lines replaced and extended, followed by the lines ``after``."""
    lines, new = script.splitlines(), dict(values)
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    header = []
    for line in lines[: last + 1]:
        found = re.match(r"#SBATCH --([\w-]+)=", line)
        header.append(directive(found[1], new.pop(found[1])) if found and found[1] in new else line)
    header += [directive(name, value) for name, value in new.items()]
    # A cluster without GPUs rejects the option.
    header = [line for line in header if not re.fullmatch(rf"#SBATCH --{GPUS}=(\S+:)?0+", line)]
    return "\n".join([*header, *after, *lines[last + 1 :]]) + "\n"


def submit(script: str) -> str:
    """Submit the script with sbatch and return the job id.

    Raises:
        UserError: there is no sbatch here, it does not answer, or it refuses (the message has its reason).
    """
    try:
        result = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True, timeout=_SUBMIT_S
        )
    except FileNotFoundError:
        raise UserError(
            "--slurm: no sbatch on PATH; submit from a login node, or print the script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"--slurm: sbatch did not answer within {_SUBMIT_S} s; try `scontrol ping`") from None
    if result.returncode:
        raise UserError(f"--slurm: {'; '.join(result.stderr.strip().splitlines()) or 'sbatch failed'}")
    return result.stdout.strip().split(";")[0]
