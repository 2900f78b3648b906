"""Trains 20 steps at every ZeRO stage on a torchrun job's ranks; writes each step's numbers and the final weights.

python -m torch.distributed.run --standalone --nproc-per-node 2 zero_worker.py OUT [CASE ...]
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mc2_hpc.config import RunConfig, config_from_dict
from mc2_hpc.distributed import Ranks, process_group
from mc2_hpc.models import packed_captions
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.packed_captions import caption_lengths
from mc2_hpc.models.presets import resolve
from mc2_hpc.precision import Precision
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.optim import learning_rate
from mc2_hpc.training.step import ContrastiveStep

STEPS, BATCH, CONTEXT = 20, 16, 12

PADDED = "zero2_gradcache_padded"

# (name, ZeRO stage, backward passes per step, precision, model.recompute); all but one pack their captions.
CASES = [
    *((f"zero{stage}", stage, 1, "fp32", "none") for stage in range(4)),
    *((f"zero{stage}_gradcache", stage, 2, "fp32", "none") for stage in range(4)),
    ("zero3_full_recompute", 3, 2, "fp32", "full"),
    ("zero3_selective_recompute", 3, 2, "fp32", "selective"),
    (PADDED, 2, 2, "fp32", "none"),
    ("zero1_bf16_selective_recompute", 1, 1, "bf16", "selective"),
    ("zero3_bf16", 3, 1, "bf16", "none"),
]


def run_config(stage: int, precision: str = "fp32", **top: object) -> RunConfig:
    """A tiny run whose larger parameters ZeRO-3 does partition."""
    return config_from_dict(
        {
            "precision": precision,
            "global_batch": BATCH,
            "steps": STEPS,
            "zero": {"stage": stage, "persist_below_elements": 100},
            "data": {"lanes": 4},
            "optim": {"lr": 1e-3, "warmup": 5},
            "loss": {"backend": "tiled"},
            "model": {
                "preset": "ViT-S-16-worldwide",
                "embed_dim": 32,
                "vision": {"image_size": 32, "width": 64, "layers": 2, "head_width": 32},
                "text": {"vocab_size": 100, "context_length": CONTEXT, "width": 48, "heads": 3, "layers": 2},
            },
            **top,
        }
    )


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same random global batches on every rank: uint8 images and token rows of any length, padded after the EOS."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(STEPS):
        images = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
        tokens = torch.randint(3, 100, (BATCH, CONTEXT), generator=generator)
        lengths = torch.randint(1, CONTEXT + 1, (BATCH, 1), generator=generator)
        after = torch.arange(CONTEXT) - lengths
        result.append((images, tokens.masked_fill(after >= -1, 2).masked_fill(after >= 0, 1)))
    return result


def share(ranks: Ranks) -> slice:
    """This rank's rows; shares are unequal if the batch is not a multiple of the ranks."""
    return slice(BATCH * ranks.rank // ranks.world_size, BATCH * (ranks.rank + 1) // ranks.world_size)


def train(
    config: RunConfig, ranks: Ranks, *, num_micro: int, recompute: str, packed: bool, backends: bool = False
) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """(loss, gradient norm, logit scale, and bias if there is one) of every step, and the final weights by name.

    Args:
        backends: compute as the config says, not with PyTorch's operators.
    """
    clip = build_clip(resolve(config.model, logit_bias=config.loss.has_bias), seed=0)
    if backends:
        clip.set_backends(config.model, ranks.device.type)
    clip.set_recompute(recompute)
    engine = Engine(clip, config, ranks, num_micro=num_micro)
    dtype = Precision(config.precision).dtype
    step = ContrastiveStep(engine, config.loss, feature_dtype=dtype)
    rows = []
    for number, (images, tokens) in enumerate(batches()):
        lr = learning_rate(number, total=STEPS, config=config.optim)
        images, tokens = images[share(ranks)].to(ranks.device), tokens[share(ranks)]
        result = step(images, tokens, lr, lengths=caption_lengths(tokens, 2) if packed else None)
        scalars = [scalar for scalar in (engine.logit_scale, engine.logit_bias) if scalar is not None]
        rows.append([float(number.detach()) for number in (result.loss, result.grad_norm, *scalars)])
    weights = {name: tensor.clone() for kind, name, tensor in engine.state() if kind == "weight"}
    engine.close()
    return rows, weights


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    packed_captions.LEAST_PLACES = 1  # these batches are too small for packing to pay
    rows = {}
    with process_group(timeout_s=120) as ranks:
        for name, stage, num_micro, precision, recompute in CASES:
            if names and name not in names:
                continue
            config = run_config(stage, precision)
            rows[name], weights = train(config, ranks, num_micro=num_micro, recompute=recompute, packed=name != PADDED)
            if ranks.is_first:
                save_file(weights, out / f"{name}.safetensors")
        if ranks.is_first:
            (out / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
