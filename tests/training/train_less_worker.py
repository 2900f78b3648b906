"""Trains at every ZeRO stage with frozen parts, adapters, or rates by tower and layer; writes what it found.

python -m torch.distributed.run --standalone --nproc-per-node 2 train_less_worker.py OUT '["CASE", STAGE]' ...
"""

import gc
import json
import sys
import weakref
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from mc2_hpc.config import RunConfig
from mc2_hpc.distributed import Ranks, process_group
from mc2_hpc.models import packed_captions
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.models.lora import add_adapters, init_adapters
from mc2_hpc.models.packed_captions import caption_lengths
from mc2_hpc.models.presets import resolve
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.freezing import adapters_of
from mc2_hpc.training.optim import learning_rate
from mc2_hpc.training.step import ContrastiveStep
from tests.training import zero_worker

STEPS, HALF = 5, 2
# An eps that is large beside rounding: AdamW would scale gradients that are nothing else up to full steps.
OPTIM: dict[str, Any] = {"lr": 1e-3, "warmup": 2, "eps": 1e-2}

CASES: dict[str, dict[str, Any]] = {
    "image tower": {"freeze": {"vision": "all"}, "optim": {"schedule": "constant", "ema_decay": 0.9}},
    "text tower and scale": {"freeze": {"text": "all", "logit_scale": True}},
    "blocks": {"freeze": {"vision": "1", "text": "0"}, "optim": {"grad_clip": 0.3}, "model": {"embedding": "dense"}},
    "learning rates": {
        "optim": {
            "vision": {"lr_scale": 0.5, "layer_decay": 0.7},
            "text": {"lr_scale": 2.0, "layer_decay": 0.9},
            "schedule": "wsd",
            "decay_steps": 1,
            "max_logit_scale": 14.27,
            "ema_decay": 0.5,
        }
    },
    "adapters": {"lora": {"rank": 4, "alpha": 6.0}, "optim": {"ema_decay": 0.9, "grad_clip": 0.3}},
    "adapters of the text tower": {
        "lora": {"rank": 2, "vision": False},
        "freeze": {"vision": "all", "logit_scale": True},
        "model": {"embedding": "dense"},
        "optim": {"schedule": "constant", "text": {"layer_decay": 0.5}},
    },
    "muon": {"optim": {"matrices": "muon", "ema_decay": 0.9, "grad_clip": 0.3, "lr": 2e-4}},
    "muon of the text tower": {
        "freeze": {"vision": "all"},
        "model": {"embedding": "dense"},
        "optim": {"matrices": "muon", "muon_momentum": 0.8, "lr": 2e-4, "text": {"lr_scale": 0.5}},
    },
}


def muon_in_fp32() -> AbstractContextManager[object]:
    """Let torch's Muon iterate in fp32: in bf16 it turns the last bit of a gradient into a difference that shows."""
    return patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone)


def stages(case: str) -> range:
    """ZeRO stages that the case can be trained at."""
    return range(3 if case.startswith("muon") else 4)


def fast_stages(case: str) -> set[int]:
    """The stages that the fast tests start at: each run is resumed at the next one too, so a case meets all of them."""
    first = list(CASES).index(case) % 2
    return {first, 2} if case.startswith("muon") else {first, first + 2}


def initial(config: RunConfig) -> CLIP:
    """The model that a run starts with."""
    clip = build_clip(resolve(config.model), seed=0)
    if (adapters := adapters_of(config)) is not None:
        add_adapters(clip, adapters)
        init_adapters(clip, seed=1)
    return clip


class Traffic(TorchDispatchMode):
    """Bytes that this rank puts into each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            inputs = args[1] if "gather" in function.__name__ or "scatter" in function.__name__ else args[0]
            tensors = [t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
            self.sent[function.__name__.partition(".")[0]] += sum(t.nbytes for t in tensors)
        return function(*args, **(kwargs or {}))


def configured(case: str, stage: int) -> RunConfig:
    """The tiny run of ``zero_worker`` with the case's settings."""
    top = CASES[case]
    base = zero_worker.run_config(stage).model
    model = {key: value for key, value in vars(base).items() if key not in ("vision", "text")}
    model |= {tower: vars(getattr(base, tower)) for tower in ("vision", "text")} | top.get("model", {})
    return zero_worker.run_config(
        stage, **{**top, "steps": STEPS, "optim": {**OPTIM, **top.get("optim", {})}, "model": model}
    )


class Run:
    """A run from the start, or from the state that another one had after ``HALF`` steps."""

    def __init__(self, ranks: Ranks, config: RunConfig, *, num_micro: int, saved: dict[str, torch.Tensor] | None):
        clip = initial(config)
        clip.set_recompute("full" if num_micro > 1 else "none")
        if saved is not None:
            clip.load_state_dict({name.partition("/")[2]: saved[name] for name in saved if name.startswith("weight/")})
        self.config = config
        table = weakref.ref(clip.text.token_embedding.weight)
        self.engine = Engine(clip, config, ranks, num_micro=num_micro)
        gc.collect()
        self.keeps_whole_table = table() is not None
        if saved is not None:
            self.engine.load_moments(Saved(saved), HALF, Averages(saved))  # type: ignore[arg-type]
        self._step = ContrastiveStep(self.engine, config.loss, feature_dtype=torch.float32)
        self._rows = zero_worker.share(ranks)

    def train(self, first: int, end: int) -> list[list[float]]:
        """(loss, gradient norm, logit scale) of every step."""
        found = []
        for number, (images, tokens) in enumerate(zero_worker.batches()[first:end], first):
            images, tokens = images[self._rows], tokens[self._rows]
            lr = learning_rate(number, total=STEPS, config=self.config.optim)
            result = self._step(images, tokens, lr, lengths=caption_lengths(tokens, 2))
            found.append([float(result.loss), float(result.grad_norm), self.engine.logit_scale.item()])
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """By ``<kind>/<name>``."""
        return {f"{kind}/{name}": tensor.clone() for kind, name, tensor in self.engine.state()}


class Saved:
    """A checkpoint's optimizer files, in memory."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self._state = state

    def get(self, key: str) -> torch.Tensor:
        name, _, kind = key.rpartition(".")
        return self._state[f"{kind}/{name}"]


class Averages(Saved):
    """A checkpoint's files of the moving average, in memory."""

    def get(self, key: str) -> torch.Tensor:
        return self._state[f"ema/{key}"]


def compare(ranks: Ranks, case: str, stage: int, out: Path) -> dict[str, Any]:
    """Train in one go, and resumed half-way: with the same settings, and at another stage in two micro-batches."""
    config = configured(case, stage)
    run = Run(ranks, config, num_micro=1, saved=None)
    rows = run.train(0, HALF - 1)
    with Traffic() as traffic:
        rows += run.train(HALF - 1, HALF)
    half = run.state()
    rows += run.train(HALF, STEPS)
    end = run.state()
    with run.engine.whole_model(ema=True) as model:
        whole = all(
            torch.equal(tensor, end.get(f"ema/{name}", end[f"weight/{name}"]))
            for name, tensor in model.state_dict().items()
        )
    run.engine.close()
    resumed = Run(ranks, config, num_micro=1, saved=half)
    resumed_rows = resumed.train(HALF, STEPS)
    after = resumed.state()
    resumed.engine.close()
    elsewhere = Run(ranks, configured(case, (stage + 1) % len(stages(case))), num_micro=2, saved=half)
    rows_elsewhere = elsewhere.train(HALF, STEPS)
    end_elsewhere = elsewhere.state()
    elsewhere.engine.close()
    if ranks.is_first:
        save_file(end, out / f"{case} {stage}.safetensors")
        save_file(end_elsewhere, out / f"{case} {stage} elsewhere.safetensors")
    return {
        "rows": rows,
        "rows elsewhere": rows_elsewhere,
        "whole average": whole,
        "keeps the whole table": run.keeps_whole_table,
        "resumed bitwise": rows[HALF:] == resumed_rows
        and end.keys() == after.keys()
        and all(torch.equal(end[key], after[key]) for key in end),
        "sent": traffic.sent,
    }


def main(out: Path, runs: list[tuple[str, int]]) -> None:
    torch.set_num_threads(1)
    packed_captions.LEAST_PLACES = 1  # these batches are too small for packing to pay
    with muon_in_fp32(), process_group(timeout_s=120) as ranks:
        found = {f"{case} {stage}": compare(ranks, case, stage, out) for case, stage in runs}
        if ranks.is_first:
            (out / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [json.loads(run) for run in sys.argv[2:]])
