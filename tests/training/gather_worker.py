"""Trains with weights gathered during the forward pass, and by DeepSpeed, on a job's ranks; writes what it found.

python -m torch.distributed.run --standalone --nproc-per-node 2 gather_worker.py OUT CASE ...
"""

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mc2_hpc.config import RunConfig, config_from_dict, config_to_dict
from mc2_hpc.distributed import Ranks, process_group
from mc2_hpc.models import packed_captions
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.models.packed_captions import caption_lengths
from mc2_hpc.models.presets import resolve
from mc2_hpc.precision import Precision
from mc2_hpc.training import weight_gather
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.step import ContrastiveStep
from tests.training import zero_worker
from tests.training.train_less_worker import Averages, Saved

SCATTER = {"reduction": "scatter", "bucket_elements": 5000}
BOTH = {**SCATTER, "reduce_dtype": "bf16", "gather_dtype": "bf16"}

# (backward passes per step, other settings)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (1, {"zero": {"stage": 1, **SCATTER}}),
    "both": (1, {"precision": "bf16", "zero": {"stage": 1, **BOTH}, "model": {"recompute": "selective"}}),
    "both_2": (
        2,
        {
            "precision": "bf16",
            "zero": {"stage": 2, **BOTH},
            "model": {"recompute": "full"},
            "optim": {"grad_clip": 0.5, "ema_decay": 0.9},
        },
    ),
    "all_reduce": (
        1,
        {
            "precision": "bf16",
            "zero": {"stage": 2, "gather_dtype": "bf16", "bucket_elements": 5000},
            "model": {"embedding": "dense"},
        },
    ),
    "compiled": (1, {"precision": "bf16", "zero": {"stage": 1, **BOTH}, "model": {"compile": True}}),
    "muon": (1, {"zero": {"stage": 1, **SCATTER}, "optim": {"matrices": "muon"}, "freeze": {"vision": "1"}}),
}
STEPS, HALF = 5, 3


def configured(name: str) -> RunConfig:
    values = config_to_dict(zero_worker.run_config(0))
    for key, value in CASES[name][1].items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return config_from_dict(values)


class Run:
    """A run from the start, or from the state that another one had after ``HALF`` steps."""

    def __init__(self, name: str, ranks: Ranks, saved: dict[str, Tensor] | None = None) -> None:
        config = configured(name)
        clip = build_clip(resolve(config.model), seed=0)
        clip.set_backends(config.model, "cpu")
        if saved is not None:
            weights = {key.removeprefix("weight/"): saved[key] for key in saved if key.startswith("weight/")}
            clip.load_state_dict(weights)
        self.engine = Engine(clip, config, ranks, num_micro=CASES[name][0])
        if saved is not None:
            averages: Any = Averages(saved) if config.optim.ema_decay else None
            self.engine.load_moments(Saved(saved), HALF, averages)  # type: ignore[arg-type]
        self._step = ContrastiveStep(self.engine, config.loss, feature_dtype=Precision(config.precision).dtype)
        self._rows = zero_worker.share(ranks)

    def step(self, number: int) -> None:
        images, tokens = (whole[self._rows] for whole in zero_worker.batches()[number])
        self._step(images, tokens, 1e-3, lengths=caption_lengths(tokens, 2))

    def state(self) -> dict[str, Tensor]:
        """By ``<kind>/<name>``."""
        return {f"{kind}/{name}": tensor.clone() for kind, name, tensor in self.engine.state()}

    def used(self) -> dict[str, Tensor]:
        """The weights that an evaluation would use."""
        with self.engine.whole_model() as model:
            return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Late:
    """A message that is not sent before somebody waits for it. The weights that it brings are NaN until then."""

    def __init__(self, output: Tensor, own: Tensor, gather: Any) -> None:
        self._output, self._own, self._gather = output, own.clone(), gather
        output.fill_(math.nan)

    def wait(self) -> None:
        self._gather(self._output, self._own)


class Watched:
    """What happens in a run's forward passes: messages are started and waited for, modules run."""

    def __init__(self, engine: Engine, gather: Any) -> None:
        self.events: list[tuple[str, Any]] = []
        self._gather = gather
        buckets = engine._gather._buckets  # in the order in which they are started
        names = {parameter: name for name, parameter in engine._parameters.items()}
        flats = engine._optimizer.bit16_groups_flat
        groups = {flat.data_ptr(): group for flat, group in zip(flats, engine._optimizer.bit16_groups, strict=True)}
        self.members = [[names[each] for each in groups[bucket.whole.data_ptr()]] for bucket in buckets]
        vision, text = engine._clip.vision, engine._clip.text
        for name, tower, first, last in (
            ("vision", vision, vision.patch_embedding, vision.norm_post),
            ("text", text, text.token_embedding, text.norm_final),
        ):
            places = {"start": first, "end": last}
            places |= {f"blocks.{number}": block for number, block in enumerate(tower.transformer.blocks)}
            for place, module in places.items():
                module.register_forward_pre_hook(self._ran(f"{name}.{place}"))

    def _ran(self, place: str) -> Any:
        def ran(*_: Any) -> None:
            self.events.append(("runs", place))

        return ran

    def start(self, output: Tensor, own: Tensor, *, async_op: bool) -> Any:
        """In place of the collective."""
        number = sum(kind == "starts" for kind, _ in self.events)  # all of them start before anything else happens
        self.events.append(("starts", number))
        work = self._gather(output, own, async_op=async_op)
        return _WatchedWork(work, lambda: self.events.append(("waits", number)))


class _WatchedWork:
    def __init__(self, work: Any, waits: Any) -> None:
        self._work, self._waits = work, waits

    def wait(self) -> None:
        self._waits()
        self._work.wait()


def by_deepspeed(name: str, ranks: Ranks) -> list[dict[str, Tensor]]:
    """The state after every step with DeepSpeed's own gather, in fp32."""
    run, states = Run(name, ranks), []
    run.engine._gather = None
    for number in range(STEPS):
        run.step(number)
        states.append(run.state())
    run.engine.close()
    return states


def undisturbed(name: str, ranks: Ranks, gather: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The state after the last step, what an evaluation would use there, and what happened in the last step."""
    run = Run(name, ranks)
    watched = Watched(run.engine, gather)
    weight_gather._all_gather = watched.start
    for number in range(STEPS):
        watched.events.clear()
        run.step(number)
    found = {"events": list(watched.events), "members": watched.members}
    used, state = run.used(), run.state()
    run.engine.close()
    return state, used, found


def late(name: str, ranks: Ranks, gather: Any) -> dict[str, Tensor]:
    """The state after the last step with weights that are NaN until their message has been waited for."""
    run = Run(name, ranks)
    weight_gather._all_gather = lambda output, own, async_op: Late(output, own, gather)
    own_start = run.engine._gather._start

    def start() -> None:
        own_start()
        for bucket in run.engine._gather._buckets:
            if bucket.arriving is not None and bucket.arriving is not bucket.whole:
                bucket.whole.fill_(math.nan)

    run.engine._gather._start = start
    for number in range(STEPS):
        run.step(number)
    state = run.state()
    run.engine.close()
    return state


def read(name: str, ranks: Ranks) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The state after every step, and the last one of a run that resumed from the one half-way."""
    run, states = Run(name, ranks), []
    for number in range(STEPS):
        run.step(number)
        states.append(run.state())
    run.engine.close()
    resumed = Run(name, ranks, states[HALF - 1])
    for number in range(HALF, STEPS):
        resumed.step(number)
    state = resumed.state()
    resumed.engine.close()
    return states, state


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    packed_captions.LEAST_PLACES = 1  # these batches are too small for packing to pay
    # Graphs are captured and differentiated as for Inductor, whose own compiler takes a minute for each.
    CLIP.compile_blocks = functools.partialmethod(CLIP.compile_blocks, backend="aot_eager")  # type: ignore[method-assign,assignment]
    gather = weight_gather._all_gather
    found = {}
    with process_group(timeout_s=120) as ranks:
        for name in names:
            weight_gather._all_gather = gather
            states = {f"deepspeed.{number}": state for number, state in enumerate(by_deepspeed(name, ranks))}
            stepwise, states["resumed"] = read(name, ranks)
            states |= {f"read.{number}": state for number, state in enumerate(stepwise)}
            states["undisturbed"], states["used"], found[name] = undisturbed(name, ranks, gather)
            states["late"] = late(name, ranks, gather)
            torch._dynamo.reset()
            if ranks.is_first:
                for way, state in states.items():
                    save_file(state, out / f"{name}.{way}.safetensors")
        if ranks.is_first:
            (out / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
