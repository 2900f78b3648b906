"""``mc2 quickstart``: every stage of the system on this machine, joined end to end.

    output/pool, heldout     pictures and candidate captions (mc2_hpc.quickstart.pool)
    output/metadata          the numbers' names in every language
    output/curated           matched captions, balance, training shards
    output/tokenizer.model   sentencepiece, trained on the pool's captions
    output/train.yaml        the training run's config; output/train: its checkpoints and metrics
    output/open_clip         the model as open_clip loads it
    output/report.json, report.html, pictures
"""

import time
from pathlib import Path

from rich.console import Console

from mc2_hpc.quickstart.recipe import Recipe
from mc2_hpc.quickstart.stages import Stages

_MARKER = ".quickstart"
_STAGES = 8
_LOGIT_TOLERANCE = 1e-3
_PACKAGES = ("mc2_hpc", "torch", "deepspeed", "open_clip_torch")


def run_quickstart(output: str | Path, *, processes: int | None = None, recipe: Recipe | None = None) -> int:
    """Do the whole job into ``output``; an earlier quickstart there is moved aside, not overwritten.

    Args:
        processes: of training; by default one a GPU, or 2 without any.

    Returns:
        the exit code, 0.

    Raises:
        UserError: ``output`` holds something else, a package is missing, or training failed.
    """
    start = time.perf_counter()
    output, recipe = Path(output), recipe or Recipe()
    _require_packages()
    processes = processes or _default_processes()
    console = Console(stderr=True)
    _claim(output, console)
    stages = Stages(_STAGES, console)
    pool, curation = _prepare_data(output, recipe, stages)
    with stages.stage(f"train with {processes} processes", bar=False):
        _train(output / "train.yaml", processes)
    with stages.stage("convert to open_clip, load it there and compare") as update:
        ...
    return 0
