"""The quickstart's settings: sizes of pool and model, and length of training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc2_hpc.config import config_from_dict, yaml_text
from mc2_hpc.storage import write_text


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings that can make a quickstart run smaller (tests do this)."""

    images: int = 20_000
    """Images in the pool."""
    shards: int = 20
    heldout_per_number: int = 10
    """Held-out images per number."""
    t_en: int = 40
    """English's balancing threshold."""
    vocab_size: int = 1_600
    """Vocabulary size of the tokenizer trained on the pool's captions."""
    steps: int = 700
    global_batch: int = 128
    warmup: int = 100
    decay_steps: int = 450
    """The last steps, in which the learning rate falls."""
    seed: int = 0


def write_training_config(path: Path, recipe: Recipe, folder: Path, vocab_size: int) -> None:
    """Write the YAML config for ``mc2 train``.

    Args:
        folder: the quickstart's output, which contains the data, the tokenizer and the run folder.
        vocab_size: the trained tokenizer's.
    """
    values: dict[str, Any] = {
        "output": str(folder / "train"),
        "steps": recipe.steps,
        "global_batch": recipe.global_batch,
        "precision": "fp32",
        "seed": recipe.seed,
        "log_every": 10,
        "model": {
            "preset": "ViT-S-16-worldwide",
            "embed_dim": 128,
            "vision": {"image_size": 32, "patch_size": 16, "width": 128, "layers": 4, "head_width": 32},
            "text": {"vocab_size": vocab_size, "width": 128, "heads": 4, "layers": 2},
        },
        "data": {
            "train": str(folder / "curated" / "shards"),
            "balance": str(folder / "curated" / "balance"),
            "tokenizer": str(folder / "tokenizer.model"),
            "tokenizer_style": "xlmv",
            "lanes": recipe.global_batch,
            "workers": 0,
            "seed": recipe.seed,
        },
        # The recipe's AdamW and cosine would take more steps to the same accuracy.
        "optim": {
            "matrices": "muon",
            "lr": 2e-3,
            "warmup": recipe.warmup,
            "schedule": "wsd",
            "decay_steps": recipe.decay_steps,
        },
        "zero": {"stage": 1},
        "checkpoint": {"every": max(1, recipe.steps // 2), "keep": 1},
    }
    config_from_dict(values, str(path))  # fails here if `mc2 train` would reject it
    write_text(path, yaml_text(values))
