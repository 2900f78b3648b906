"""The dense losses, softmax (alone and with a teacher) and sigmoid: the reference for tests and benchmarks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .shared_batch import SharedBatch
from .statistics import finite
from .teacher import Teacher


def reference_loss(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean of the image-to-text and text-to-image cross entropy over all N pairs (Radford et al. 2021, figure 3).

    Holds several N x N matrices. Computes in the features' own type, including fp64; half types in fp32.
    """
    image_ND, text_ND = _wide(image_ND), _wide(text_ND)
    return _cross_entropy(logit_scale.to(image_ND.dtype).exp() * image_ND @ text_ND.t())


def reference_terms(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    teacher_image_NE: Tensor,
    teacher_text_NE: Tensor,
    teacher_scale: float,
) -> Tensor:
    """(2,) the contrastive loss and the mean over rows and columns of KL(softmax of the teacher || softmax of the
    student), Hinton et al. 2015 without its factor T^2, as in Meta CLIP 2's distillation.

    Holds and computes like :func:`reference_loss`.
    """
    image_ND, text_ND = _wide(image_ND), _wide(text_ND)
    student = logit_scale.to(image_ND.dtype).exp() * image_ND @ text_ND.t()
    teacher = teacher_scale * _wide(teacher_image_NE) @ _wide(teacher_text_NE).t()
    divergence = (_divergence(student, teacher) + _divergence(student.t(), teacher.t())) / 2
    return torch.stack((_cross_entropy(student), divergence))


def reference_sigmoid_loss(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Sum over all N x N pairs of softplus(-z logit) / N, where z is 1 for positive pairs and -1 for all others
    (SigLIP, Zhai et al. 2023, algorithm 1).

    Holds and computes like :func:`reference_loss`.
    """
    image_ND, text_ND = _wide(image_ND), _wide(text_ND)
    scale, bias = (x.to(image_ND.dtype).reshape(()) for x in (logit_scale, logit_bias))
    logits = scale.exp() * image_ND @ text_ND.t() + bias
    z = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(z * logits).sum() / len(logits)


def _wide(features: Tensor) -> Tensor:
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")


def _cross_entropy(logits: Tensor) -> Tensor:
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def distributed_reference_loss(image_bD: Tensor, text_bD: Tensor, logit_scale: Tensor, shared: SharedBatch) -> Tensor:
    """``reference_loss`` of all ranks' pairs, on every rank; its gradients follow ``contrastive_loss``'s convention."""
    image_ND, text_ND = (_gather_with_own_gradient(features, shared) for features in (image_bD, text_bD))
    # Every rank has the full gradient of logit_scale, so its average over ranks is the full gradient too.
    return finite(reference_loss(image_ND, text_ND, logit_scale))


def distributed_reference_terms(
    image_bD: Tensor, text_bD: Tensor, logit_scale: Tensor, teacher: Teacher, shared: SharedBatch
) -> Tensor:
    """``reference_terms`` of all ranks' pairs, on every rank, likewise."""
    both = (image_bD, text_bD, teacher.image_features.detach(), teacher.text_features.detach())
    image_ND, text_ND, teacher_image, teacher_text = (_gather_with_own_gradient(features, shared) for features in both)
    return finite(reference_terms(image_ND, text_ND, logit_scale, teacher_image, teacher_text, teacher.scale))


def distributed_reference_sigmoid_loss(
    image_bD: Tensor, text_bD: Tensor, logit_scale: Tensor, logit_bias: Tensor, shared: SharedBatch
) -> Tensor:
    """``reference_sigmoid_loss`` of all ranks' pairs, on every rank, likewise."""
    image_ND, text_ND = (_gather_with_own_gradient(features, shared) for features in (image_bD, text_bD))
    # An infinite logit of the right sign costs nothing, but no feature may be infinite.
    all_finite = torch.isfinite(image_ND).all() & torch.isfinite(text_ND).all()
    loss = reference_sigmoid_loss(image_ND, text_ND, logit_scale, logit_bias)
    return finite(torch.where(all_finite, loss, torch.nan))


def _gather_with_own_gradient(local: Tensor, shared: SharedBatch) -> Tensor:
    if shared.size == 1:
        return local
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
