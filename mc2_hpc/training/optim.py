"""AdamW with the recipe's parameter groups, and the learning rate by step, tower and layer."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mc2_hpc.config import OptimConfig
from mc2_hpc.models.depth import depth_of, num_layers, tower_of
from mc2_hpc.models.presets import ClipArchitecture

_NO_DECAY_MARKS = ("norm", "bias", "logit_scale")


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices (embedding tables and positional embeddings too), never to gains,
    biases, ``logit_bias``, the class embedding or ``logit_scale`` (open_clip's grouping, which the recipe keeps)."""
    return parameter.ndim >= 2 and not any(mark in name for mark in _NO_DECAY_MARKS)


def lr_factor(name: str, arch: ClipArchitecture, config: OptimConfig) -> float:
    """What a parameter's learning rate is relative to the run's, by its name in ``CLIP.state_dict()``; 1 for
    ``logit_scale`` and ``logit_bias``."""
    tower = tower_of(name)
    if tower is None:
        return 1.0
    layers = num_layers(arch, tower)
    return (config.vision if tower == "vision" else config.text).factor(depth_of(name, layers), layers)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], arch: ClipArchitecture, config: OptimConfig
) -> list[dict[str, Any]]:
    """AdamW groups of the parameters that require a gradient, one for each pair of weight decay and ``lr_factor``;
    those with decay first."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault((decays(name, parameter), lr_factor(name, arch, config)), []).append(parameter)
    # Sorting is stable: groups with the same decay stay in the order of their first parameters.
    return [
        {"params": params, "weight_decay": config.weight_decay if decayed else 0.0, "lr_factor": factor}
        for (decayed, factor), params in sorted(groups.items(), key=lambda group: not group[0][0])
    ]


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """PyTorch's fused AdamW with the config's betas; :func:`set_learning_rate` is called before every step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the run's learning rate in groups of :func:`parameter_groups`. Their weight decay is relative to it too."""
    for group in groups:
        group["lr"] = lr * group["lr_factor"]


def learning_rate(step: int, *, total: int, config: OptimConfig) -> float:
    """Learning rate of ``step`` (counted from 0) of ``total``: linear warm-up to ``config.lr``, then the schedule.

    The formulas are open_clip's. Warm-up: ``lr (step + 1) / warmup``. ``cosine_lr``:
    ``lr (1 + cos(pi (step - warmup) / (total - warmup))) / 2``. ``const_lr``: ``lr``. ``const_lr_cooldown`` of power 1
    to 0, which is warm-up-stable-decay: ``lr`` and, in the last ``decay_steps``, ``lr (total - step) / decay_steps``.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        return config.lr * min(1.0, (total - step) / config.decay_steps)
    progress = (step - config.warmup) / max(1, total - config.warmup)
    return 0.5 * config.lr * (1 + math.cos(math.pi * progress))
