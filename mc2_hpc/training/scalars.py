"""The scalars of a model, ``logit_scale`` and ``logit_bias``, outside DeepSpeed.

A scalar gains nothing from being partitioned and has to stay in fp32, and the scale is clamped after every step. So
each rank keeps identical copies, updated by the same AdamW with the same averaged gradients.
"""

import math

import torch
from torch import Tensor, nn

from mc2_hpc.config import OptimConfig
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.depth import tower_of
from mc2_hpc.training.optim import adamw, parameter_groups, set_learning_rate
from mc2_hpc.training.tower_state import average, create_state


class Scalars:
    """Copies in fp32 of the parameters that a model has outside its towers."""

    def __init__(self, clip: CLIP, config: OptimConfig, device: torch.device) -> None:
        """Copy them to the device; those that require no gradient stay as they are."""
        self.parameters = {name: _copy(p, device) for name, p in clip.named_parameters() if tower_of(name) is None}
        """By name."""
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        """Those that are."""
        self._max_scale = math.log(config.max_logit_scale)
        self._ema_decay = config.ema_decay
        self._optimizer: torch.optim.AdamW | None = None
        if self.trained:
            self._optimizer = adamw(parameter_groups(self.trained.items(), clip.arch, config), config)
            for scalar in self.trained.values():
                create_state(self._optimizer, scalar, ema=self._ema_decay > 0)

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the multiplier of similarities, 0-d."""
        return self.parameters["logit_scale"]

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """Of the sigmoid loss, 0-d."""
        return self.parameters.get("logit_bias")

    def gradients(self) -> list[Tensor]:
        """This rank's, 0-d, of :attr:`trained` in order."""
        found = []
        for scalar in self.trained.values():
            assert scalar.grad is not None
            found.append(scalar.grad)
        return found

    def step(self, gradients: Tensor, lr: float) -> None:
        """Update by averaged gradients, (len(:attr:`trained`),), and clamp the scale to its limits."""
        if self._optimizer is None:
            return
        for own, averaged in zip(self.gradients(), gradients.unbind(), strict=True):
            own.copy_(averaged)
        set_learning_rate(self._optimizer.param_groups, lr)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.logit_scale.requires_grad:  # a frozen one stays as it starts
            with torch.no_grad():
                self.logit_scale.clamp_(0, self._max_scale)

    def average(self) -> None:
        """Move the moving average on by a step."""
        if self._optimizer is not None:
            average(self._optimizer, list(self.trained.values()), self._ema_decay)

    def copy_to(self, clip: CLIP) -> None:
        """Give a model these values."""
        with torch.no_grad():
            for name, scalar in self.parameters.items():
                clip.get_parameter(name).copy_(scalar)

    def full(self, kind: str, name: str) -> Tensor:
        """A tensor of the state, itself: ``weight``, or of a trained scalar what AdamW keeps of it."""
        if kind == "weight":
            return self.parameters[name]
        assert self._optimizer is not None
        return self._optimizer.state[self.parameters[name]][kind]

    def resume(self, step: int) -> None:
        """Continue after that many steps."""
        for name in self.trained:
            self.full("step", name).fill_(step)


def _copy(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    copy = parameter.detach().to(device, torch.float32, copy=True)
    return nn.Parameter(copy, requires_grad=parameter.requires_grad)
