"""Steps that train or compute less, compared with the whole step: patch dropout, a frozen image tower, stored features.

    mc2 bench train_less [--quick] [--json FILE]

A ViT-B/16-shaped model of fewer layers at 224 px, on random images and captions of 24 tokens. All contenders start with
the same weights and train on the same batch, alternately in one process. ``vision_tower`` is the image tower alone,
forward and backward, on half of the patches and on all.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import alternate, main, spread
from mc2_hpc.config import RunConfig, config_from_dict
from mc2_hpc.data.normalise import normalise
from mc2_hpc.distributed import Ranks, process_group
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import resolve
from mc2_hpc.precision import Precision
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.patch_dropout import PatchDropout
from mc2_hpc.training.step import ContrastiveStep

SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "patch_dropout_0.5": {"model": {"patch_dropout": 0.5}},
    "vision_frozen": {"freeze": {"vision": "all"}},
    "stored_features": {"freeze": {"vision": "all"}, "data": {"features": "in memory"}},
}
_TOKENS = 24


def run(quick: bool) -> dict[str, Any]:
    """Seconds of a step and of the image tower, by what is trained and computed."""
    batch, layers, rounds = (8, 1, 3) if quick else (32, 4, 7)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with process_group(60) as ranks:
        for what, contenders in _contenders(ranks, batch=batch, layers=layers).items():
            seconds = alternate(contenders, rounds=rounds)
            for who, samples in seconds.items():
                rows.append({"what": what, "who": who, "unit": "s", **spread(samples), "samples": samples})
                if who != "whole":
                    pairs = zip(seconds["whole"], samples, strict=True)
                    ratios[f"{what}_{who}_vs_whole"] = statistics.median(a / b for a, b in pairs)
    return {"config": {"batch": batch, "layers": layers, "settings": SETTINGS}, "rows": rows, "ratios": ratios}


def _config(who: str, *, batch: int, layers: int) -> RunConfig:
    settings = SETTINGS[who]
    model = {
        "preset": "ViT-B-16-worldwide",
        "vision": {"layers": layers},
        "text": {"layers": layers, "vocab_size": 8000},
        **settings.get("model", {}),
    }
    return config_from_dict(
        {
            "global_batch": batch,
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
            "zero": {"stage": 1},
            **settings,
            "model": model,
            "data": {"lanes": 1, **settings.get("data", {})},
        },
        "benchmark",
    )


def _contenders(ranks: Ranks, *, batch: int, layers: int) -> dict[str, dict[str, Callable[[], object]]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, generator=generator).to(ranks.device)
    tokens = torch.randint(3, 8000, (batch, _TOKENS), generator=generator)
    tokens[:, -1] = 2
    keys = [str(number) for number in range(batch)]
    steps = {who: _step(ranks, _config(who, batch=batch, layers=layers), images, tokens, keys) for who in SETTINGS}
    towers = {who: _tower(ranks, _config(who, batch=batch, layers=layers), images, keys) for who in list(SETTINGS)[:2]}
    return {"step": steps, "vision_tower": towers}


def _step(ranks: Ranks, config: RunConfig, images: Tensor, tokens: Tensor, keys: list[str]) -> Callable[[], object]:
    arch = resolve(config.model)
    clip = build_clip(arch, seed=0)
    clip.set_backends(config.model, ranks.device.type)
    engine = Engine(clip, config, ranks, num_micro=1)
    step = ContrastiveStep(engine, config.loss, feature_dtype=Precision(config.precision).dtype)
    dropout = PatchDropout(config, arch, ranks.device)
    if config.data.features is not None:
        images = torch.nn.functional.normalize(torch.randn(len(images), arch.embed_dim, device=ranks.device), dim=-1)
    return lambda: step(images, tokens, 1e-4, kept=dropout(keys, 0))


def _tower(ranks: Ranks, config: RunConfig, images: Tensor, keys: list[str]) -> Callable[[], object]:
    arch = resolve(config.model)
    clip = build_clip(arch, seed=0).to(ranks.device)
    precision = Precision(config.precision)
    dropout = PatchDropout(config, arch, ranks.device)

    def call() -> None:
        with precision.autocast(ranks.device):
            features = clip.encode_image(normalise(images, precision.dtype), kept=dropout(keys, 0))
        torch.autograd.grad(features.sum(), list(clip.vision.parameters()))

    return call


if __name__ == "__main__":
    main("train_less", run)
