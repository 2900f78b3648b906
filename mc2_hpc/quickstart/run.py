"""``mc2 quickstart``: every stage of the system on this machine, end to end.

output/pool, heldout     images and candidate captions (mc2_hpc.quickstart.pool)
output/metadata          the numbers' names in every language
output/curated           matched captions, balance, training shards
output/tokenizer.model   sentencepiece, trained on the captions that matched
output/train.yaml        config of the training run; output/train: its checkpoints and metrics
output/eval.yaml         suite that the model is scored on, for `mc2 eval output/train --suite output/eval.yaml`
output/open_clip         the model in open_clip's format
output/report.json, report.html, images
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from mc2_hpc.errors import UserError
from mc2_hpc.quickstart.captions import LANGUAGES, tokenizer_texts
from mc2_hpc.quickstart.recipe import Recipe, write_training_config
from mc2_hpc.quickstart.report import write_report
from mc2_hpc.quickstart.samples import draw_samples, save_images
from mc2_hpc.quickstart.stages import Stages
from mc2_hpc.shard_paths import list_shards
from mc2_hpc.storage import write_json

_MARKER = ".quickstart"
_LOGIT_TOLERANCE = 1e-4
"""Logits (up to 100) that differ by more than this mean a broken conversion, not rounding."""
_MODULES = ("sklearn", "num2words", "matplotlib", "open_clip", "torchvision")
_PACKAGES = ("mc2_hpc", "torch", "deepspeed", "open_clip_torch")


def run_quickstart(output: str | Path, *, processes: int | None = None, recipe: Recipe | None = None) -> int:
    """Run all stages into ``output``; an earlier quickstart there is moved aside.

    Args:
        processes: training processes; by default one per GPU, or 2 without GPUs.

    Returns:
        the exit code, 0.

    Raises:
        UserError: ``output`` contains something else, a package is missing, or training failed.
        RuntimeError: the converted model's logits differ from the trained model's.
    """
    start = time.perf_counter()
    output, recipe = Path(output), recipe or Recipe()
    _require_modules()
    processes = processes or _default_processes()
    console = Console(stderr=True)
    _claim(output, console)
    stages = Stages(7, console)
    data = prepare_data(output, recipe, stages)
    with stages.stage(f"train, {recipe.steps:,} steps on {processes} processes", bar=False):
        _train(output / "train.yaml", processes)
    results = _examine(output, stages)
    report = {
        **data,
        **results,
        "curves": _curves(output),
        "training": _metrics(output),
        "languages": list(LANGUAGES),
        "steps": recipe.steps,
        "global_batch": recipe.global_batch,
        "processes": processes,
        "machine": f"{_cores()} CPU cores, {platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in _PACKAGES},
        "outputs": {name: str(output / name) for name in ("open_clip", "train", "train.yaml")},
        "stages": [{"name": name, "seconds": seconds} for name, seconds in stages.times.items()],
    }
    rates = [row["samples_per_second"] for row in report["training"]]
    report["samples_per_second"] = statistics.median(rates)
    report["skipped"] = _skipped(data["curation"], report["training"])
    report["seconds"] = time.perf_counter() - start
    write_json(output / "report.json", report)
    page = write_report(report, output)
    console.print(
        f"zero-shot {report['zero_shot_mean']:.1%} over {len(LANGUAGES)} languages (chance {report['chance']:.0%}), "
        f"{report['seconds']:.0f} s in total",
        highlight=False,
    )
    print(page)
    return 0


def _require_modules() -> None:
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise UserError(f"the quickstart needs {', '.join(missing)}: pip install 'mc2_hpc[quickstart]'")


def _default_processes() -> int:
    import torch

    return torch.cuda.device_count() or 2


def _claim(output: Path, console: Console) -> None:
    """Make ``output`` an empty folder marked as ours; an earlier quickstart's folder is renamed."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder with --output")
    if output.is_dir() and any(output.iterdir()):
        if not (output / _MARKER).is_file():
            raise UserError(f"{output}: contains other files; name a new or empty folder with --output")
        number = 1
        while (aside := output.with_name(f"{output.name}.{number}")).exists():
            number += 1
        output.rename(aside)
        console.print(f"the earlier run is now {aside}", highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARKER).touch()


def prepare_data(output: Path, recipe: Recipe, stages: Stages) -> dict[str, Any]:
    """All stages from pool to training config; returns the report's keys about data."""
    from mc2_hpc import jobs
    from mc2_hpc.curation.run import plan_run
    from mc2_hpc.data.tokenizer import train_tokenizer
    from mc2_hpc.metadata.build import Sources, build_folder
    from mc2_hpc.quickstart.pool import make_pool

    with stages.stage("make a pool of images and captions") as update:
        summary = make_pool(
            output,
            images=recipe.images,
            shards=recipe.shards,
            heldout_per_number=recipe.heldout_per_number,
            seed=recipe.seed,
            progress=update,
        )
    with stages.stage("build metadata") as update:
        sources = dict.fromkeys(LANGUAGES, Sources(numbers=False, number_names=True))
        build_folder(sources, output / "metadata", progress=lambda stage, done, total, name: update(done, total))
    with stages.stage("curate: match, balance, pack") as update:
        curation = jobs.run(
            plan_run(output / "pool", output / "metadata", output / "curated", t_en=recipe.t_en),
            jobs.Local(workers=_cores()),
            lambda stage, done, total, name: update(done, total),
        )
    assert curation is not None  # None only for submitted jobs that are not waited for
    with stages.stage("train a tokenizer"):
        texts = tokenizer_texts(_matched_captions(output / "curated" / "matched"))
        tokenizer = train_tokenizer(texts, output / "tokenizer.model", vocab_size=recipe.vocab_size, style="xlmv")
        write_training_config(output / "train.yaml", recipe, output, tokenizer.vocab_size)
    balance = curation["balance"]
    return {
        "images": summary.images,
        "captions": summary.captions,
        "heldout_images": summary.heldout_images,
        "samples": draw_samples(output),
        "curation": curation,
        "balance": {name: balance[name] for name in ("t_en", "p", "t")},
        "english_share_before": balance["english_share_before"],
        "english_share_after": balance["english_share_after"],
    }


def _matched_captions(matched: Path) -> list[str]:
    from mc2_hpc.curation.matched import read_matched

    return [
        text for path in list_shards(matched, ".parquet") for text in read_matched(path, ["text"])["text"].to_pylist()
    ]


def _train(config: Path, processes: int) -> None:
    """Run ``mc2 train`` on ``processes`` processes that share the cores.

    Raises:
        UserError: it failed, after printing its own message.
    """
    command = [sys.executable, "-m", "mc2_hpc.cli", "train", str(config), "--processes", str(processes)]
    threads = {"OMP_NUM_THREADS": str(max(1, _cores() // processes))}
    code = subprocess.run(command, env={**os.environ, **threads}).returncode
    if code:
        raise UserError(f"training ended with exit code {code} (see above); try it alone: mc2 train {config}")


def _examine(output: Path, stages: Stages) -> dict[str, Any]:
    """Evaluate, convert and compare; returns the report's keys about the model."""
    import torch

    from mc2_hpc.conversion.convert import convert
    from mc2_hpc.distributed import process_group
    from mc2_hpc.evaluation.dual_encoders import open_dual_encoder
    from mc2_hpc.evaluation.encoder import Encoder
    from mc2_hpc.quickstart.results import evaluate, open_clip_difference, write_suite

    write_suite(output / "eval.yaml", output)
    with process_group() as ranks:
        encoder = Encoder.load(output / "train", ranks)
        with stages.stage("evaluate on held-out handwriting") as update:
            results = evaluate(output / "eval.yaml", encoder, update)
    for example in results["retrieval_examples"]:
        save_images(output, output / "heldout", example["hits"])
    with stages.stage("convert to open_clip, load it there, compare", bar=False):
        convert(output / "train", "open_clip", output / "open_clip")
        ours = open_dual_encoder(output / "train", torch.device("cpu"))
        difference, differing = open_clip_difference(ours, output / "open_clip", output / "heldout")
    if not difference <= _LOGIT_TOLERANCE:
        raise RuntimeError(f"{output / 'open_clip'}: its logits differ from the trained model's by {difference}")
    return {
        **results,
        "parameters": ours.facts.parameters,
        "open_clip_max_abs_diff": difference,
        "open_clip_captions_tokenized_differently": differing,
    }


def _curves(output: Path) -> dict[str, dict[str, list[float]]]:
    from mc2_hpc.quickstart.results import head_tail_curves

    return head_tail_curves(output / "curated", LANGUAGES)


def _metrics(output: Path) -> list[dict[str, Any]]:
    lines = (output / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _skipped(curation: Mapping[str, Any], training: list[dict[str, Any]]) -> dict[str, int]:
    """Counts of what curation and training dropped, by reason."""
    total: Counter[str] = Counter()
    for drops in (curation["match"]["drops"], curation["pack"]["drops"], training[-1]["skipped"]):
        total.update(drops)
    return dict(sorted(total.items()))


def _cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
