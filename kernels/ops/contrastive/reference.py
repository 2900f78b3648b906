"""The dense contrastive loss: the reference for tests and benchmarks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .shared_batch import SharedBatch


def reference_loss(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean of the image-to-text and text-to-image cross entropy over all N pairs (Radford et al. 2021, figure 3).

    Holds several N x N matrices. Computes in the features' own type, including fp64; half types in fp32.
    """
    if image_ND.dtype in (torch.bfloat16, torch.float16):
        image_ND, text_ND = image_ND.float(), text_ND.float()
    logits = logit_scale.to(image_ND.dtype).exp() * image_ND @ text_ND.t()
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def distributed_reference_loss(image_bD: Tensor, text_bD: Tensor, logit_scale: Tensor, shared: SharedBatch) -> Tensor:
    """``reference_loss`` of all ranks' pairs, on every rank; its gradients follow ``contrastive_loss``'s convention."""
    if shared.size > 1:
        image_bD, text_bD = (_gather_with_own_gradient(features, shared) for features in (image_bD, text_bD))
    # Every rank has the full gradient of logit_scale, so its average over ranks is the full gradient too.
    loss = reference_loss(image_bD, text_bD, logit_scale)
    return torch.where(torch.isfinite(loss), loss, torch.nan)


def _gather_with_own_gradient(local: Tensor, shared: SharedBatch) -> Tensor:
    every, own = shared.gather(local.detach()).wait(), shared.part(shared.rank)
    return torch.cat([every[: own.start], _GradientTimes.apply(local, shared.size), every[own.stop :]])


class _GradientTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
