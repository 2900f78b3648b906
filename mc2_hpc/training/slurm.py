"""Training jobs on Slurm: fill ``slurm/train.sbatch`` for one run, and limit how often it restarts.

The batch script runs this module before the ranks (``python -m mc2_hpc.training.slurm CONFIG key.sub=value ...``).
Importing it does not import torch.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mc2_hpc.config import RunConfig, load_config
from mc2_hpc.data.lanes import check_ranks
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.batch_scripts import GPUS, check_gpus, fill_in, header_of, num_gpus, scripts_folder
from mc2_hpc.jobs.slurm_options import check_text, parse_slurm_options
from mc2_hpc.reading.json_file import Count, File, read_json
from mc2_hpc.storage import write_json

KEYS = {"nodes": "nodes", "gpus": GPUS, "ranks": "ntasks-per-node", "cpus": "cpus-per-task"}
"""Short names for sbatch's options: nodes, GPUs and ranks per node, cores per rank."""
_OWN = {"nodes": 1, "ranks": 1, "cpus": 1, "ntasks-per-node": 1, "cpus-per-task": 1}
_OWN_TEXTS = ("gpus", GPUS, "env")
"""Keys in addition to sbatch's: counts with the minimum of each, and those that are not counts."""

MAX_STARTS = 5
"""Starts of one job without a new checkpoint in between; the environment variable MC2_MAX_STARTS overrides it."""

STARTS = "slurm-starts.json"
"""In the run's folder."""


def parse_options(words: Sequence[str]) -> dict[str, str]:
    """The words of ``--slurm`` as a dictionary; see :mod:`mc2_hpc.jobs.slurm_options` for their grammar.

    Raises:
        UserError: a malformed word, an unknown key, an invalid value, or GPUs requested twice.
    """
    short = {option: key for key, option in KEYS.items()}
    parsed = parse_slurm_options(words, {**_OWN, **dict.fromkeys(_OWN_TEXTS)})
    options = {short.get(key, key): value for key, value in parsed.items()}
    check_gpus(options)
    return options


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
    script = _shipped()
    shape = shape_of(options)
    values = {
        "job-name": Path(config.output).name,
        "output": f"{config.output.replace('%', '%%')}/slurm-%j.log",
        "ntasks-per-node": str(shape.ranks_per_node),
        "cpus-per-task": str(config.data.workers + 2),
        **{KEYS.get(key, key): value for key, value in options.items() if key != "env"},
    }
    if num_gpus("gres", options.get("gres", "")):
        values[GPUS] = "0"  # gres requests them already
    check_ranks(shape.ranks, config.data.lanes, where="--slurm: ")
    for argument in arguments:
        check_text("mc2 train", argument)
    return fill_in(script, values, arguments, environment=options.get("env"))


@dataclass(frozen=True, kw_only=True)
class JobShape:
    """The nodes and ranks of a training job."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def shape_of(options: Mapping[str, str]) -> JobShape:
    """The shape of the job that :func:`fill_script` makes of these options.

    Raises:
        UserError: neither GPUs nor a number of ranks are given.
    """
    header = header_of(_shipped())
    gpus = num_gpus("gres", options.get("gres", "")) or num_gpus("gpus", options.get("gpus", header[GPUS]))
    if gpus == 0 and "ranks" not in options:
        raise UserError("--slurm gpus=0: how many ranks per node? add ranks=N")
    nodes, ranks = int(options.get("nodes", header["nodes"])), int(options.get("ranks", gpus))
    return JobShape(nodes=nodes, ranks_per_node=ranks, gpus_per_node=gpus)


def _shipped() -> str:
    return (scripts_folder() / "train.sbatch").read_text(encoding="utf-8")


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
