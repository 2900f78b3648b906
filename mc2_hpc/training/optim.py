"""AdamW with the recipe's parameter groups, and its learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mc2_hpc.config import OptimConfig

_NO_DECAY_MARKS = ("norm", "bias", "logit_scale")


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices (embedding tables and positional embeddings too), never to gains,
    biases, the class embedding or ``logit_scale`` (open_clip's grouping, which the recipe keeps)."""
    return parameter.ndim >= 2 and not any(mark in name for mark in _NO_DECAY_MARKS)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups of the parameters that require a gradient, decayed first; a group without parameters is left out."""
    with_decay: list[nn.Parameter] = []
    without: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        (with_decay if decays(name, parameter) else without).append(parameter)
    groups = [
        {"params": with_decay, "weight_decay": config.weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """PyTorch's fused AdamW with the config's betas; the learning rate is set before every step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, *, total: int, config: OptimConfig) -> float:
    """Learning rate of ``step`` (counted from 0): linear warm-up to ``config.lr``, then cosine decay to 0.

    The formula is open_clip's ``cosine_lr``: ``lr (step + 1) / warmup`` below ``warmup``, then
    ``lr (1 + cos(pi (step - warmup) / (total - warmup))) / 2``.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, total - config.warmup)
    return 0.5 * config.lr * (1 + math.cos(math.pi * progress))
