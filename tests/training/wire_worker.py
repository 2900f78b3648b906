"""Trains with every way to reduce gradients and gather weights on a job's ranks; writes what it found.

python -m torch.distributed.run --standalone --nproc-per-node 2 wire_worker.py OUT CASE ...
"""

import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mc2_hpc.config import RunConfig
from mc2_hpc.distributed import Ranks, process_group
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import resolve
from mc2_hpc.planning.counting import Counting
from mc2_hpc.planning.trace import CountedEngine, CountedStep
from mc2_hpc.precision import Precision
from mc2_hpc.training.engine import Engine
from tests.training import zero_worker

SCATTER = {"reduction": "scatter", "bucket_elements": 5000}
BF16 = {"reduce_dtype": "bf16"}
GATHER = {"gather_dtype": "bf16"}

# (backward passes per step, precision, other settings of ``zero``, of ``optim``)
CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    **{
        f"{name}{stage}_{num_micro}": (num_micro, "fp32", {"stage": stage, **zero}, {})
        for name, zero in (("whole", {}), ("scatter", SCATTER), ("scatter_bf16_", {**SCATTER, **BF16}))
        for stage, num_micro in ((1, 1), (2, 2))
    },
    **{f"whole_bf16_{stage}_1": (1, "fp32", {"stage": stage, **BF16}, {}) for stage in (0, 1, 3)},
    "whole_clipped": (2, "fp32", {"stage": 1}, {"grad_clip": 0.5, "ema_decay": 0.9}),
    "scatter_clipped": (2, "fp32", {"stage": 1, **SCATTER}, {"grad_clip": 0.5, "ema_decay": 0.9}),
    "autocast": (1, "bf16", {"stage": 1}, {"ema_decay": 0.9}),
    "gather_bf16": (1, "bf16", {"stage": 1, **GATHER}, {"ema_decay": 0.9}),
    # As if each two ranks were on a node of their own.
    **{
        f"nodes{stage}_{num_micro}": (num_micro, "fp32", {"stage": stage, **SCATTER, **BF16}, {})
        for stage, num_micro in ((1, 1), (2, 2))
    },
    # One group each, so that a rank's gradients lie alike.
    "one_whole": (2, "fp32", {"stage": 1}, {}),
    "one_scatter_bf16": (2, "fp32", {"stage": 1, "reduction": "scatter", **BF16}, {}),
}
STEPS = 2


def configured(name: str) -> RunConfig:
    _, precision, zero, optim = CASES[name]
    return zero_worker.run_config(zero["stage"], precision, zero=zero, optim={"lr": 1e-3, **optim})


def train(name: str, ranks: Ranks, out: Path) -> dict[str, Any]:
    """What rank 0 writes: the whole state after the first and the last step, this rank's gradients of the first, and
    the collectives of the last."""
    config, num_micro = configured(name), CASES[name][0]
    if name.startswith("nodes"):
        ranks = dataclasses.replace(ranks, per_node=2)
    counting = Counting(gloo=False)
    engine = CountedEngine(
        build_clip(resolve(config.model), seed=0), config, ranks, num_micro=num_micro, counting=counting
    )
    step = CountedStep(engine, config.loss, feature_dtype=Precision(config.precision).dtype)
    step.count(counting)
    norms, started = [], _watch(engine)
    gradients = _first_gradients(engine) if config.zero.stage == 1 else []
    for number, (images, tokens) in enumerate(zero_worker.batches()[:STEPS]):
        rows = zero_worker.share(ranks)
        counting.begin()
        with counting if number == STEPS - 1 else nullcontext():
            norms.append(float(step(images[rows], tokens[rows], 1e-3).grad_norm))
            with counting.phase("gather"):  # the next forward pass would do it otherwise
                engine._finish_gather()
        state = {f"{kind}.{key}": tensor.clone() for kind, key, tensor in engine.state()}
        if ranks.is_first:
            save_file(state, out / f"{name}.{number}.safetensors")
    with engine.whole_model() as model:
        used = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    if ranks.is_first:
        save_file(used, out / f"{name}.used.safetensors")
        save_file({str(number): gradient for number, gradient in enumerate(gradients)}, out / f"{name}.own.safetensors")
    engine.close()
    return {
        "norms": norms,
        "started before the first block": started,
        "collectives": [[each.phase, each.kind, each.group, each.calls, each.bytes] for each in counting.collectives()],
    }


def _watch(engine: Engine) -> list[int]:
    """The number of sums that had been started when backward came to the image tower's first block, by
    step."""
    started: list[int] = []
    scatter = engine._scatter
    if scatter is not None:
        weight = engine._parameters["vision.transformer.blocks.0.fc.weight"]
        weight.register_post_accumulate_grad_hook(lambda _: started.append(len(scatter._running)))
    return started


def _first_gradients(engine: Engine) -> list[torch.Tensor]:
    """Filled with this rank's flat averaged gradient of every group in the first step."""
    optimizer, found = engine._optimizer, []
    step = optimizer.step

    def keep(*args: Any) -> Any:
        if not found:
            groups = optimizer.averaged_gradients.values()
            found.extend(torch.cat([piece.flatten() for piece in group]) for group in groups)
        return step(*args)

    optimizer.step = keep
    return found


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    with process_group(timeout_s=120) as ranks:
        found = {name: train(name, ranks, out) for name in names}
        if ranks.is_first:
            (out / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
