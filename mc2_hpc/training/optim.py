"""AdamW with the recipe's parameter groups, in one of three implementations, and the learning rate by step, tower and
layer."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from mc2_hpc.config import OptimConfig, RunConfig
from mc2_hpc.config_stages import RunStage
from mc2_hpc.errors import UserError
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


def _deepspeed_adam() -> Callable[..., torch.optim.Optimizer]:
    from deepspeed.ops.adam import FusedAdam

    return partial(FusedAdam, bias_correction=True, adam_w_mode=True, amsgrad=False, set_grad_none=True)


def _apex_adam() -> Callable[..., torch.optim.Optimizer]:
    from apex.optimizers import FusedAdam

    # ZeRO holds the fp32 weights already.
    return partial(
        FusedAdam,
        bias_correction=True,
        adam_w_mode=True,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    )


_FUSED_ADAMS = {
    "deepspeed": (
        _deepspeed_adam,
        "DeepSpeed builds it in the first start, which needs ninja and the CUDA toolkit that torch was built with "
        "(CUDA_HOME); or install DeepSpeed with DS_BUILD_FUSED_ADAM=1",
    ),
    "apex": (
        _apex_adam,
        "build NVIDIA's apex from source (https://github.com/NVIDIA/apex, with APEX_CPP_EXT=1 APEX_CUDA_EXT=1; PyPI's "
        "package of this name is a different project)",
    ),
}
"""By ``optim.backend``: a function that loads the class, and how to install it."""


def tower_optimizer(groups: list[dict[str, Any]], config: OptimConfig, device_type: str) -> torch.optim.Optimizer:
    """AdamW as ``optim.backend`` says, with the same groups, betas and learning rates as :func:`adamw`.

    Raises:
        UserError: the backend does not load or does not run on this device.
    """
    if config.backend == "torch":
        return adamw(groups, config)
    load, cure = _FUSED_ADAMS[config.backend]
    _check_device(config.backend, device_type)
    try:
        return load()(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0)
    except Exception as error:  # compilers, linkers and missing extensions fail in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"optim.backend={config.backend}: FusedAdam does not load ({reason}); {cure}; or set optim.backend=torch"
        ) from None


def _check_device(backend: str, device_type: str) -> None:
    if device_type != "cuda":
        raise UserError(
            f"optim.backend={backend}: its FusedAdam runs on a GPU, not on {device_type}; set optim.backend=torch"
        )


def set_step_count(optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    """Let an optimizer whose state exists continue after ``num_steps`` steps.

    torch's AdamW counts them in a tensor of each parameter's state, which may be on a GPU, DeepSpeed's FusedAdam in a
    number there, and apex's in a number of each group.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        for state in optimizer.state.values():
            state["step"].fill_(num_steps)
        return
    for state in optimizer.state.values():
        state["step"] = num_steps
    for group in optimizer.param_groups:
        group["step"] = num_steps


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the run's learning rate in groups of :func:`parameter_groups`. Their weight decay is relative to it too."""
    for group in groups:
        group["lr"] = lr * group["lr_factor"]


def stage_learning_rate(step: int, stage: RunStage[RunConfig]) -> float:
    """That of the run's ``step`` (counted from 0), which is in ``stage``."""
    begin, total = stage.schedule
    return learning_rate(step - begin, total=total, config=stage.config.optim)


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
