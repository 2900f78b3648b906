"""The global gradient norm over towers, token table and Muon's matrices, and clipping by it, at every ZeRO stage.

DeepSpeed computes the norm of the gradients it holds and clips them within its own step. At stages 1-3 the gradients of
the table's rows and of the matrices are given to its norm as well, so there is one norm and DeepSpeed's clipping is
right as it is. At stage 0 DeepSpeed has no norm to extend: the gradients are clipped here before its step. Norms are
summed in fp64, where the order of the sum does not matter, so that a sharded and a dense table give the same norm.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def add_to_norm(optimizer: Any, stage: int, others: Callable[[], Sequence[Tensor]]) -> None:
    """Make the norm of DeepSpeed's ZeRO optimizer (0.19) include gradients that are not its parameters'.

    Args:
        stage: 1, 2 or 3.
        others: this rank's part of them; every element must be on one rank only.
    """
    own: Callable[..., Tensor] = optimizer.get_grad_norm_direct
    first_group = optimizer.fp16_groups[0] if stage == 3 else optimizer.params_in_partition[0]

    def with_gradient(gradients: Sequence[Tensor], params: Sequence[nn.Parameter], norm_type: float = 2) -> Tensor:
        if params is first_group:
            # It reads from the parameter only whether to count its gradient; any one of them is counted. A rank may
            # have no part of the first group.
            added, stand_in = others(), params[0] if params else nn.Parameter(torch.empty(0))
            gradients, params = [*added, *gradients], [*[stand_in] * len(added), *params]
        return own(gradients, params, norm_type)

    optimizer.get_grad_norm_direct = with_gradient


def clip_replicated(gradients: list[Tensor], others: Sequence[Tensor] | None, max_norm: float) -> Tensor:
    """Clip gradients that are equal on all ranks by their norm, and return it from before, 0-d fp32.

    Args:
        others: this rank's part of gradients that count too, but are not scaled. Collective if given.
        max_norm: 0 does not clip.
    """
    squared = _squared_norm(gradients, gradients[0].device)
    if others is not None:
        of_others = _squared_norm(others, gradients[0].device)
        dist.all_reduce(of_others)
        squared += of_others
    norm = squared.sqrt().float()
    if max_norm > 0:
        torch._foreach_mul_(gradients, clip_coefficient(norm, max_norm))
    return norm


def _squared_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    if not gradients:  # a rank may own none
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(list(gradients), 2, torch.float64)).square().sum()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """The factor that brings a gradient of that norm down to ``max_norm``, at most 1, 0-d: DeepSpeed's formula."""
    return 1.0 / ((norm + 1e-6) / max_norm).clamp(min=1.0)
