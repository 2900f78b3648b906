"""``mc2 bench NAME --slurm``: fill ``slurm/bench.sbatch``, which runs a benchmark on every node of a job."""

from collections.abc import Sequence

from mc2_hpc.jobs.batch_scripts import GPUS, check_gpus, fill_in, num_gpus, scripts_folder
from mc2_hpc.jobs.slurm_options import Own, parse_slurm_options

_OWN: Own = {"nodes": 1, "gpus": None, GPUS: None, "env": None}


def fill_bench_script(name: str, words: Sequence[str], *, quick: bool) -> str:
    """The text of ``bench.sbatch`` for one benchmark; anything not given in ``--slurm`` stays as shipped.

    Args:
        words: of ``--slurm``; see :mod:`mc2_hpc.jobs.slurm_options` for their grammar.

    Raises:
        UserError: a malformed word, an unknown key, an invalid value, GPUs requested twice, or no such ``env`` file.
    """
    parsed = parse_slurm_options(words, _OWN)
    options = {"gpus" if key == GPUS else key: value for key, value in parsed.items()}
    check_gpus(options)
    values = {GPUS if key == "gpus" else key: value for key, value in options.items() if key != "env"}
    if num_gpus("gres", options.get("gres", "")):
        values[GPUS] = "0"  # gres requests them already
    script = (scripts_folder() / "bench.sbatch").read_text(encoding="utf-8")
    return fill_in(script, values, [name, *(["--quick"] if quick else [])], environment=options.get("env"))
