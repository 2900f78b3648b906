"""FusedAdam on a CPU: the interface of NVIDIA's class, and DeepSpeed's own class over a kernel in PyTorch."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mc2_hpc.training import optim


def multi_tensor_adam(
    chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float,
    step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """The kernel that both classes call: gradients, parameters and moments are updated in place."""
    assert type(step) is int and step > 0 and mode == 1 and bias_correction == 1
    for g, p, m, v in zip(*lists, strict=True):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        p.sub_(lr * (update + weight_decay * p))


class ApexFusedAdam(torch.optim.Optimizer):
    """The interface of ``apex.optimizers.FusedAdam``, and its way to keep state: steps are counted by group."""

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, adam_w_mode: bool = True, weight_decay: float = 0.0, amsgrad: bool = False,
        set_grad_none: bool = True, capturable: bool = False, master_weights: bool = False,
    ) -> None:  # fmt: skip
        assert adam_w_mode and not amsgrad and not capturable and not master_weights
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay
        }  # fmt: skip
        super().__init__(params, defaults)
        self.set_grad_none = set_grad_none

    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            lists: list[list[Tensor]] = [[], [], [], []]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                for part, tensor in zip(lists, (p.grad, p, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                    part.append(tensor)
            if lists[0]:
                multi_tensor_adam(
                    0, torch.zeros(1), lists, group["lr"], *group["betas"], group["eps"], group["step"], 1,
                    int(group["bias_correction"]), group["weight_decay"],
                )  # fmt: skip


def install() -> None:
    """Let both backends run on this process's CPU."""
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    apex.optimizers = optimizers  # type: ignore[attr-defined]
    optimizers.FusedAdam = ApexFusedAdam  # type: ignore[attr-defined]
    sys.modules |= {"apex": apex, "apex.optimizers": optimizers}
    import deepspeed.ops.adam.fused_adam as theirs

    class Builder:
        def load(self) -> SimpleNamespace:
            return SimpleNamespace(multi_tensor_adam=multi_tensor_adam)

    theirs.FusedAdamBuilder = Builder
    optim._check_device = lambda backend, device_type: None
