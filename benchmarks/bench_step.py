"""One training step on one device, without a data loader: ours by setting, and open_clip's model at its best.

    mc2 bench step [--quick] [--json FILE]

On a GPU: ViT-H/14 worldwide in bf16 autocast, 196 pairs (the recipe's share per GPU), by attention backend,
torch.compile and recomputation. open_clip runs its model, ClipLoss and fused AdamW under the same autocast,
with the same settings. On a CPU: a small model in fp32, which only shows that the script works. Every contender runs in
a separate process, because DeepSpeed keeps global state and memory is measured per process.

A row has the median seconds per step, samples per second, MFU over the model's own flops (without recomputation), and
peak memory. ``config.profile`` lists the ten largest costs of our fastest setting.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from benchmarks.harness import ROOT, Rows, main, own_command, spread
from mc2_hpc.config import RunConfig, config_from_dict
from mc2_hpc.data.normalise import normalise
from mc2_hpc.distributed import Ranks, process_group
from mc2_hpc.models.clip import build_clip, flops_per_pair
from mc2_hpc.models.presets import ClipArchitecture, resolve
from mc2_hpc.precision import Precision
from mc2_hpc.training.throughput import peak_flops

PEER = "open_clip"
WARMUP_STEPS = 3
"""The first steps include compilation and the selection of algorithms."""
SECONDS_IN_ALL = 240
"""No contender starts later than this, and none may run longer, because time on a GPU machine is limited."""

SETTINGS: dict[str, dict[str, Any]] = {
    "ours_sdpa": {"attention": "sdpa", "recompute": "full"},
    PEER: {"recompute": "full"},
    "ours_compiled": {"attention": "sdpa", "recompute": "full", "compile": True},
    f"{PEER}_compiled": {"recompute": "full", "compile": True},
    "ours_selective": {"attention": "sdpa", "recompute": "selective"},
    "ours_unfused": {"attention": "sdpa", "recompute": "selective", "norm": "torch", "activation": "torch"},
    "ours_apex": {"attention": "sdpa", "recompute": "selective", "norm": "apex"},
    "ours_deepspeed_adam": {"attention": "sdpa", "recompute": "selective"},
    "ours_xformers": {"attention": "xformers", "recompute": "full"},
    "ours_keeping_activations": {"attention": "sdpa", "recompute": "none"},
    f"{PEER}_keeping_activations": {"recompute": "none"},
}
"""Values of the ``model`` section of a run's config, by contender, the most informative first."""

OPTIMIZERS = {"ours_apex": "apex", "ours_deepspeed_adam": "deepspeed"}
"""``optim.backend`` of the contenders for which it is not torch."""

ON_CPU = ("ours_sdpa", PEER, "ours_keeping_activations", f"{PEER}_keeping_activations")

Step = Callable[[Tensor, Tensor], object]


def run(quick: bool) -> dict[str, Any]:
    """Rows of all contenders that run here (``quick``: the first two), and our best rate relative to open_clip's."""
    cuda = torch.cuda.is_available()
    start = time.monotonic()
    rows, missing = Rows(), {}
    names = (tuple(SETTINGS) if cuda else ON_CPU)[: 2 if quick else None]
    for number, name in enumerate(names, 1):
        if time.monotonic() - start > SECONDS_IN_ALL:
            missing[name] = "no time left"
            continue
        try:
            with _waiting(f"{number} of {len(names) + 1}: {name}"):
                rows.append({"who": name, **_in_its_own_process(name, quick)})
        except RuntimeError as error:
            missing[name] = str(error)
    best = {side: _best(rows, side) for side in ("ours", PEER)}
    ratios = {}
    if best["ours"] and best[PEER]:
        ratios["samples_per_second_vs_open_clip"] = (
            best["ours"]["samples_per_second"] / best[PEER]["samples_per_second"]
        )
    costs = []
    if best["ours"]:
        with _waiting(f"{len(names) + 1} of {len(names) + 1}: profile of {best['ours']['who']}"):
            costs = _in_its_own_process(best["ours"]["who"], quick, "--profile")
    return {
        "config": {**_sizes(quick), "missing": missing, "profile": costs},
        "rows": rows,
        "ratios": ratios,
    }


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """Report on standard error what is measured, the time elapsed (on a terminal) and the total time."""
    console, start = Console(stderr=True), time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what)
        if not console.is_terminal:
            console.print(f"{what} ...")
        yield
    console.print(f"{what}: {time.monotonic() - start:.0f} s")


def _best(rows: list[dict[str, Any]], side: str) -> dict[str, Any] | None:
    mine = [row for row in rows if row["who"].startswith(side)]
    return max(mine, key=lambda row: row["samples_per_second"], default=None)


def _sizes(quick: bool) -> dict[str, Any]:
    if torch.cuda.is_available():
        return {
            "preset": "ViT-H-14-worldwide-quickgelu",
            "precision": "bf16",
            "batch": 196,
            "steps": 3 if quick else 10,
        }
    batch, steps = (2, 2) if quick else (8, 5)
    return {"preset": "ViT-S-16-worldwide", "precision": "fp32", "batch": batch, "steps": steps}


def _run_config(name: str, quick: bool) -> RunConfig:
    sizes = _sizes(quick)
    # A small vocabulary for the small model: a table of 900k rows would dominate its step.
    text = {} if torch.cuda.is_available() else {"text": {"vocab_size": 8_000}}
    values = {
        "global_batch": sizes["batch"],
        "precision": sizes["precision"],
        "model": {"preset": sizes["preset"], **SETTINGS[name], **text},
        "data": {"lanes": 1},
        "optim": {"backend": OPTIMIZERS.get(name, "torch")},
        "zero": {"stage": 1},
    }
    return config_from_dict(values, "benchmark")


def _in_its_own_process(name: str, quick: bool, *options: str) -> Any:
    """The output of ``measure`` or ``profile`` for a contender; raises RuntimeError with the last line of its error."""
    command = [*own_command(__file__), "--contender", name, *(["--quick"] if quick else []), *options]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS_IN_ALL)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {SECONDS_IN_ALL} s") from None
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or "no message").splitlines()[-1])
    return json.loads(result.stdout.splitlines()[-1])


def measure(name: str, quick: bool) -> dict[str, Any]:
    """The row of one contender, measured in this process."""
    config = _run_config(name, quick)
    arch = resolve(config.model)
    seconds = []
    with process_group(60) as ranks:
        step, images, tokens = _prepare(name, config, arch, ranks)
        device = ranks.device
        for number in range(WARMUP_STEPS + _sizes(quick)["steps"]):
            _synchronize(device)
            start = time.perf_counter()
            step(images, tokens)
            _synchronize(device)
            if number >= WARMUP_STEPS:
                seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    dtype = Precision(config.precision).dtype
    flops = len(images) * flops_per_pair(arch, tokens.shape[1])
    row = {
        "seconds": median,
        "spread": spread(seconds),
        "samples_per_second": len(images) / median,
        "mfu": flops / median / peak_flops(device, dtype),
        "samples": seconds,
    }
    if device.type == "cuda":
        row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def profile(name: str, quick: bool) -> list[dict[str, Any]]:
    """The ten operators that take the most time in a step, with their shares."""
    config = _run_config(name, quick)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with process_group(60) as ranks:
        device = ranks.device
        step, images, tokens = _prepare(name, config, resolve(config.model), ranks)
        step(images, tokens)
        _synchronize(device)
        with torch.profiler.profile(activities=activities) as recorded:
            step(images, tokens)
            _synchronize(device)
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    costs = sorted(recorded.key_averages(), key=lambda event: getattr(event, attribute), reverse=True)
    total = sum(getattr(event, attribute) for event in costs)
    return [
        {"operator": event.key, "calls": event.count, "share": getattr(event, attribute) / total}
        for event in costs[:10]
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prepare(name: str, config: RunConfig, arch: ClipArchitecture, ranks: Ranks) -> tuple[Step, Tensor, Tensor]:
    """A contender's step, and its inputs on the device: uint8 images (b, 3, S, S) and token ids (b, L)."""
    device = ranks.device
    generator = torch.Generator().manual_seed(0)
    size, length = arch.vision.image_size, arch.text.context_length
    images = torch.randint(0, 256, (config.global_batch, 3, size, size), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(5, arch.text.vocab_size, (config.global_batch, length), generator=generator)
    tokens[:, -1] = arch.text.eos_id
    step = _open_clip_step(config, arch, device) if name.startswith(PEER) else _our_step(config, arch, ranks)
    # Token ids stay on the host, as a loader delivers them.
    return step, images.to(device), tokens.pin_memory() if device.type == "cuda" else tokens


def _our_step(config: RunConfig, arch: ClipArchitecture, ranks: Ranks) -> Step:
    from mc2_hpc.training.engine import Engine
    from mc2_hpc.training.step import ContrastiveStep

    clip = build_clip(arch, seed=0)
    clip.set_backends(config.model, ranks.device.type)
    engine = Engine(clip, config, ranks, num_micro=1)
    dtype = Precision(config.precision).dtype
    step = ContrastiveStep(engine, config.loss, feature_dtype=dtype)
    return lambda images, tokens: step(images, tokens, config.optim.lr)


def _open_clip_step(config: RunConfig, arch: ClipArchitecture, device: torch.device) -> Step:
    from mc2_hpc.conversion.open_clip import config as open_clip_config
    from mc2_hpc.conversion.peers import import_open_clip
    from mc2_hpc.models.weights import ModelCard

    open_clip = import_open_clip()
    values = open_clip_config(ModelCard(arch=arch, tokenizer_style="xlmv"))["model_cfg"]
    values["text_cfg"].pop("hf_tokenizer_name", None)
    with torch.device(device):
        model = open_clip.model.CLIP(**values, output_dict=True)
    model.set_grad_checkpointing(config.model.recompute == "full")
    loss = open_clip.ClipLoss()
    optim = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    forward = torch.compile(model) if config.model.compile else model
    precision = Precision(config.precision)

    def step(images: Tensor, tokens: Tensor) -> None:
        optimizer.zero_grad()
        with precision.autocast(device):
            on_device = tokens.to(device, non_blocking=True)
            loss(**forward(normalise(images, precision.dtype), on_device)).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
        what = profile if "--profile" in sys.argv else measure
        print(json.dumps(what(sys.argv[2], "--quick" in sys.argv)))
    else:
        main("step", run)
