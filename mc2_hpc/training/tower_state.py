"""The towers' state in DeepSpeed's optimizer, whole and by parameter name, at every ZeRO stage.

DeepSpeed steps flat partitions in place of the parameters. It has no public way to create or fill their state, hence
the attribute names of its optimizers here (0.19). Frozen parameters have no state; at stage 3 their weights are
partitioned like the others'.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mc2_hpc.training.optim import set_step_count

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"
"""The kind of state that is the moving average of the weights; AdamW leaves it alone."""


def create_state(optimizer: torch.optim.Optimizer, tensor: Tensor, *, ema: bool) -> None:
    """Allocate what AdamW would allocate for ``tensor`` in its first step, filled with zeros; and its moving average,
    which begins as ``tensor``.

    This makes memory run out at the start or not at all, and gives a checkpoint something to fill.
    """
    optimizer.state[tensor] = {
        # Fused AdamW counts steps on the device, in fp32.
        "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
        **{kind: torch.zeros_like(tensor) for kind in MOMENTS},
        **({EMA: tensor.detach().clone()} if ema else {}),
    }


def average(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor], decay: float) -> None:
    """Move the averages of ``tensors`` on by a step."""
    with torch.no_grad():
        torch._foreach_lerp_([optimizer.state[tensor][EMA] for tensor in tensors], list(tensors), 1 - decay)


class TowerState:
    """AdamW's state of the trained parameters, and the weights of all."""

    def __init__(
        self,
        optimizer: Any,
        stage: int,
        parameters: Mapping[str, nn.Parameter],
        *,
        ema: bool,
        rounded: Collection[str] = (),
    ) -> None:
        """Create the state, which also lets DeepSpeed link every parameter to its own.

        On its own, DeepSpeed links all parameter groups after it has stepped the first, when the others have no state
        yet.

        Args:
            optimizer: DeepSpeed's, or torch's at stage 0.
            parameters: of the module that DeepSpeed trains, by name.
            ema: keep a moving average of the trained ones.
            rounded: names of parameters that are not equal to their master copy.
        """
        self._stage, self._parameters = stage, parameters
        self._rounded = frozenset(rounded)
        self.trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        """Names of the parameters that have a state; evaluation lets the others require gradients too."""
        self._inner, self._flats = optimizer, [parameters[name] for name in parameters if name in self.trained]
        if stage in (1, 2):
            self._inner, self._flats = optimizer.optimizer, optimizer.single_partition_of_fp32_groups
        elif stage == 3:
            self._inner, self._flats = optimizer.optimizer, optimizer.fp32_partitioned_groups_flat
        for tensor in self._flats:
            create_state(self._inner, tensor, ema=ema)
        set_step_count(self._inner, 0)
        if stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()

    def full(self, kind: str, name: str) -> Tensor:
        """A whole parameter (``weight``) or its state, in fp32 on the device. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        if kind == "weight":
            if self._stage < 3 and name not in self._rounded:
                return parameter  # whole on every rank, and equal to the master copy
            return safe_get_full_fp32_param(parameter) if name in self.trained else _gathered(parameter)
        if self._stage == 0:
            return self._inner.state[parameter][kind]
        return safe_get_full_optimizer_state(parameter, kind)

    def shape(self, name: str) -> torch.Size:
        """Full shape of a parameter, partitioned or not."""
        parameter = self._parameters[name]
        return getattr(parameter, "ds_shape", parameter.shape)

    def load(self, kind: str, name: str, value: Tensor) -> None:
        """Set the state of a parameter from a whole tensor. Not collective."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameter = self._parameters[name]
        if self._stage == 0:
            self._inner.state[parameter][kind].copy_(value)
        elif self._stage == 3:
            # Every rank holds a piece of equal size, the last ones padded; the full-tensor setter ignores the padding.
            held = getattr(parameter, "ds_tensor")  # noqa: B009  # DeepSpeed's
            piece = torch.zeros(held.numel(), device=held.device)
            start = dist.get_rank() * piece.numel()
            mine = value.flatten()[start : start + piece.numel()]
            piece[: mine.numel()] = mine
            safe_set_local_optimizer_state(parameter, piece, kind)
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), kind)

    def average(self, decay: float) -> None:
        """Move the average of the weights on by a step."""
        average(self._inner, self._flats, decay)

    def resume(self, num_steps: int) -> None:
        """Continue after ``num_steps`` steps."""
        set_step_count(self._inner, num_steps)


def _gathered(parameter: nn.Parameter) -> Tensor:
    """A frozen parameter of stage 3, which has no master copy."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()
