"""Training jobs on Slurm: fill ``slurm/train.sbatch`` for one run, submit it, and limit how often it restarts.

The batch script runs this module before the ranks (``python -m mc2_hpc.training.slurm CONFIG key.sub=value ...``).
Importing it does not import torch.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mc2_hpc.config import RunConfig, load_config
from mc2_hpc.data.lanes import check_ranks
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.slurm_options import check_text, directive, parse_slurm_options
from mc2_hpc.reading.json_file import Count, File, read_json
from mc2_hpc.storage import write_json

KEYS = {"nodes": "nodes", "gpus": "gpus-per-node", "ranks": "ntasks-per-node", "cpus": "cpus-per-task"}
"""Short names for sbatch's options: nodes, GPUs and ranks per node, cores per rank."""
_OWN = {"nodes": 1, "ranks": 1, "cpus": 1, "ntasks-per-node": 1, "cpus-per-task": 1}
_OWN_TEXTS = ("gpus", "gpus-per-node", "env")
"""Keys in addition to sbatch's: counts with the minimum of each, and those that are not counts."""

MAX_STARTS = 5
"""Starts of one job without a new checkpoint in between; the environment variable MC2_MAX_STARTS overrides it."""

STARTS = "slurm-starts.json"
"""In the run's folder."""

_SUBMIT_S = 120


def scripts_folder() -> Path:
    """Folder of ``train.sbatch`` and its companions: inside an installed package, next to it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed, checkout = package / "slurm_scripts", package.parent / "slurm"
    return installed if installed.is_dir() else checkout


def parse_options(words: Sequence[str]) -> dict[str, str]:
    """The words of ``--slurm`` as a dictionary; see :mod:`mc2_hpc.jobs.slurm_options` for their grammar.

    Raises:
        UserError: a malformed word, an unknown key, an invalid value, or GPUs requested twice.
    """
    short = {option: key for key, option in KEYS.items()}
    parsed = parse_slurm_options(words, {**_OWN, **dict.fromkeys(_OWN_TEXTS)})
    options = {short.get(key, key): value for key, value in parsed.items()}
    if "gpus" in options and not re.fullmatch(r"([\w.-]+:)?[0-9]{1,6}", options["gpus"], flags=re.ASCII):
        raise UserError(
            f"--slurm gpus={options['gpus']}: must be a whole number per node, with or without a type: gpus=4, "
            "gpus=a100:4"
        )
    asked = [f"{key}={options[key]}" for key in ("gpus", "gres") if key in options and _num_gpus(key, options[key])]
    asked += [f"{key}={options[key]}" for key in ("gpus-per-task", "gpus-per-socket") if key in options]
    if len(asked) > 1 or any(word.startswith("gpus-per") for word in asked):
        raise UserError(f"--slurm {' '.join(asked)}: request GPUs once, with gpus=N (per node) or gres=gpu:N")
    return options


def _num_gpus(key: str, value: str) -> int:
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


def fill_script(config: RunConfig, arguments: Sequence[str], options: Mapping[str, str]) -> str:
    """The text of ``train.sbatch`` for one run.

    Args:
        arguments: the arguments of ``mc2 train`` on every rank: config file, overrides, flags.
        options: from :func:`parse_options`; anything not given stays as in the shipped script, except that there are
            as many ranks as GPUs, and a core for each decoding process.

    Raises:
        UserError: ``checkpoint.resume`` is false, neither GPUs nor a number of ranks are given, there are more ranks
            than lanes, or the ``env`` file does not exist.
    """
    check_text("output", config.output)
    if not config.checkpoint.resume:
        raise UserError("--slurm with checkpoint.resume=false: each start of the job would start the run from scratch")
    script = (scripts_folder() / "train.sbatch").read_text(encoding="utf-8")
    header: dict[str, str] = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, flags=re.MULTILINE))
    of_gres = _num_gpus("gres", options.get("gres", ""))
    gpus = of_gres or _num_gpus("gpus", options.get("gpus", header["gpus-per-node"]))
    if gpus == 0 and "ranks" not in options:
        raise UserError("--slurm gpus=0: how many ranks per node? add ranks=N")
    values = {
        "job-name": Path(config.output).name,
        "output": f"{config.output.replace('%', '%%')}/slurm-%j.log",
        "ntasks-per-node": str(gpus),
        "cpus-per-task": str(config.data.workers + 2),
        **{KEYS.get(key, key): value for key, value in options.items() if key != "env"},
    }
    if of_gres:
        values["gpus-per-node"] = "0"  # gres requests them already
    ranks = int(values.get("nodes", header["nodes"])) * int(values["ntasks-per-node"])
    check_ranks(ranks, config.data.lanes, where="--slurm: ")
    environment = Path(options.get("env", scripts_folder() / "env.sh")).resolve()
    if not environment.is_file():
        raise UserError(f"--slurm env={environment}: no such file")
    check_text("--slurm env", str(environment))
    for argument in arguments:
        check_text("mc2 train", argument)
    exports = {"MC2_SLURM": scripts_folder(), "MC2_ENV": environment, "MC2_PYTHON": sys.executable}
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
    header = [line for line in header if not re.fullmatch(r"#SBATCH --gpus-per-node=(\S+:)?0+", line)]
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


class Starts(File):
    """``slurm-starts.json``."""

    job: str
    newest: str | None
    """The newest checkpoint at the last start."""
    starts: Count
    """Of that job, since that checkpoint."""


def read_starts(output: Path) -> Starts | None:
    """The starts of the run's last Slurm job, or ``None`` if there was no job.

    Raises:
        UserError: the file is damaged.
    """
    record = output / STARTS
    return read_json(record, Starts, cure="delete it") if record.is_file() else None


def count_start(output: Path, job_id: str, *, max_starts: int) -> int:
    """Record another start of a job in the run folder; returns the number since its newest checkpoint, including this.

    Raises:
        UserError: there are more than ``max_starts``: whatever ends the job would end it again.
    """
    from mc2_hpc.models.weights import read_latest  # not at the top: it imports torch

    latest = output / "checkpoints" / "latest"
    newest = read_latest(latest.parent) if latest.is_file() else None
    before = read_starts(output)
    again = before is not None and (before.job, before.newest) == (job_id, newest)
    starts = before.starts + 1 if before is not None and again else 1
    if starts > max_starts:
        raise UserError(
            f"{output}: giving up after {max_starts} starts of job {job_id} without a new checkpoint "
            f"(newest: {newest or 'none'}); fix the error in its log and submit it again"
        )
    write_json(output / STARTS, {"job": job_id, "newest": newest, "starts": starts})
    return starts


def main(argv: Sequence[str] | None = None) -> int:
    """Called by the batch script before it starts the ranks; returns 0 to proceed, or prints one line and returns 2."""
    parser = argparse.ArgumentParser(prog="mc2_hpc.training.slurm", add_help=False)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    arguments, _ = parser.parse_known_intermixed_args(argv)
    try:
        config = load_config(arguments.config, [word for word in arguments.overrides if "=" in word])
        limit = os.environ.get("MC2_MAX_STARTS", str(MAX_STARTS))
        if not limit.isdigit() or int(limit) < 1:
            raise UserError(f"environment variable MC2_MAX_STARTS={limit!r}: must be a whole number of at least 1")
        count_start(Path(config.output), os.environ["SLURM_JOB_ID"], max_starts=int(limit))
    except UserError as error:
        print(f"mc2: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
