"""The contrastive softmax and sigmoid losses over a batch sharded across ranks, without storing the logit matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import all_gather, ring
from .dispatch import BACKENDS, choose_backend, tile_factory
from .function import ContrastiveLoss, DistilledContrastiveLoss, Plan, SigmoidLoss
from .products import accumulator_dtype
from .reference import (
    distributed_reference_loss,
    distributed_reference_sigmoid_loss,
    distributed_reference_terms,
    reference_loss,
    reference_sigmoid_loss,
    reference_terms,
)
from .shared_batch import share_batch
from .teacher import Distillation, Teacher

__all__ = [
    "BACKENDS",
    "EXCHANGES",
    "Teacher",
    "contrastive_loss",
    "distilled_contrastive_loss",
    "reference_loss",
    "reference_sigmoid_loss",
    "reference_terms",
    "sigmoid_loss",
]

EXCHANGES = {"all_gather": all_gather, "ring": ring}
"""How ranks exchange texts. ``all_gather`` overlaps the first tiles with communication; the memory of ``ring`` does not
depend on the world size."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    group: ProcessGroup | None = None,
    batches: Sequence[int] | None = None,
    backend: str = "auto",
    exchange: str = "all_gather",
    workspace_bytes: int | None = None,
) -> Tensor:
    """Mean of the image-to-text and text-to-image cross entropy over the pairs of all ranks (CLIP's loss).

    Args:
        image_features, text_features: (b, D) of this rank's pairs, normalised or not, in bf16, fp16 or fp32 (fp64 with
            the ``tiled`` and ``reference`` backends). b may differ between ranks and may be 0.
        logit_scale: scalar, the logarithm of the factor applied to the dot products, in [0, ln 100].
        group: ranks that share the batch; ``None`` is the default group, or one process if there is none.
        batches: the pairs of every rank, in rank order, where they are known, as they are if data are dealt by a fixed
            rule. All ranks must pass the same. ``None`` exchanges them in every call, which on a GPU waits for the
            features.
        backend: ``triton``, ``tiled`` (PyTorch), ``reference`` (dense) or ``auto`` (the table in ``dispatch``).
        exchange: one of ``EXCHANGES``.
        workspace_bytes: memory for logit tiles, besides what grows with b or D; ``None`` is the device's default.

    Returns the global loss, a scalar in fp32 (fp64 for fp64), bitwise identical on every rank; NaN if any feature of
    any rank is not finite. Each rank's gradient is its part of the global gradient times the world size, so that
    *averaging* parameter gradients over ranks, as data parallelism does, gives the exact gradient. All ranks must call
    it, and its backward, together; if a rank is lost, the others fail after the group's timeout. Two runs on the same
    ranks and inputs give the same bits.

    Raises ``ValueError`` for invalid inputs, ``RuntimeError`` for a backend that cannot run here.
    """
    _check(image_features, text_features, logit_scale, exchange)
    backend = _usable_backend(backend, image_features)
    shared = share_batch(image_features, group, batches)
    # Autocast would round logits to half precision.
    with torch.autocast(image_features.device.type, enabled=False):
        if backend == "reference":
            return distributed_reference_loss(image_features, text_features, logit_scale, shared)
        plan = Plan(tile_factory(backend, workspace_bytes), EXCHANGES[exchange], shared)
        return ContrastiveLoss.apply(image_features, text_features, logit_scale, plan)


def distilled_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    teacher: Teacher,
    *,
    group: ProcessGroup | None = None,
    batches: Sequence[int] | None = None,
    backend: str = "auto",
    exchange: str = "all_gather",
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``contrastive_loss`` plus ``teacher.weight`` times the divergence of the student's softmax from the teacher's.

    The divergence is the mean over all rows (image to text) and all columns (text to image) of KL(teacher || student),
    where the teacher's logits are ``teacher.scale`` times its own dot products, and the student's are those of the
    contrastive loss. The student's logits of a tile are shared by both terms, and no B x B matrix is stored.

    Args and what holds for ranks are those of :func:`contrastive_loss`. The teacher's width E and its scale and weight
    must be the same on every rank. Features of the student and of ``logit_scale`` have gradients, the teacher's do not.

    Returns the global loss, and its two terms (2,): contrastive loss and unweighted divergence, without a gradient.
    NaN if any feature of student or teacher on any rank is not finite.

    Raises ``ValueError`` for invalid inputs, ``RuntimeError`` for a backend that cannot run here.
    """
    _check(image_features, text_features, logit_scale, exchange)
    teacher.check(image_features)
    backend = _usable_backend(backend, image_features)
    shared = share_batch(image_features, group, batches, teacher.image_features.shape[1])
    with torch.autocast(image_features.device.type, enabled=False):
        if backend == "reference":
            terms = distributed_reference_terms(image_features, text_features, logit_scale, teacher, shared)
            return terms[0] + teacher.weight * terms[1], terms.detach()
        distillation = Distillation.of(teacher, image_features.shape[1])
        plan = Plan(tile_factory(backend, workspace_bytes, distillation), EXCHANGES[exchange], shared)
        return DistilledContrastiveLoss.apply(image_features, text_features, logit_scale, plan, teacher)


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: ProcessGroup | None = None,
    batches: Sequence[int] | None = None,
    backend: str = "auto",
    exchange: str = "all_gather",
    workspace_bytes: int | None = None,
) -> Tensor:
    """SigLIP's loss over the pairs of all ranks: every image-text pair is a binary classification (arXiv 2303.15343).

    The mean over images of the sum over *all* texts of softplus(-z (exp(logit_scale) dot + logit_bias)), where z is 1
    for the image's own text and -1 for all others.

    Args are those of :func:`contrastive_loss`, and ``logit_bias``, a scalar; it begins as -10 in the paper, and
    ``logit_scale`` as log 10. So are the value and its gradients on ranks, that of ``logit_bias`` included.

    Raises ``ValueError`` for invalid inputs, ``RuntimeError`` for a backend that cannot run here.
    """
    _check(image_features, text_features, logit_scale, exchange)
    _check_scalar("logit_bias", logit_bias, image_features)
    backend = _usable_backend(backend, image_features)
    shared = share_batch(image_features, group, batches)
    with torch.autocast(image_features.device.type, enabled=False):
        if backend == "reference":
            return distributed_reference_sigmoid_loss(image_features, text_features, logit_scale, logit_bias, shared)
        bias = logit_bias.detach().to(accumulator_dtype(image_features.dtype)).reshape(())
        plan = Plan(tile_factory(backend, workspace_bytes, bias=bias), EXCHANGES[exchange], shared)
        return SigmoidLoss.apply(image_features, text_features, logit_scale, logit_bias, plan)


def _usable_backend(backend: str, features: Tensor) -> str:
    backend = choose_backend(backend, features.device, features.dtype)
    if backend == "triton" and features.dtype == torch.float64:
        raise ValueError("the triton backend supports bf16, fp16 and fp32 features, not fp64: use backend='tiled'")
    return backend


def _check(image: Tensor, text: Tensor, logit_scale: Tensor, exchange: str) -> None:
    if image.ndim != 2 or image.shape != text.shape or image.shape[1] == 0:
        raise ValueError(
            f"image and text features must both be (pairs, width), got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    if image.dtype != text.dtype or image.dtype not in _DTYPES:
        raise ValueError(f"image and text features must both be bf16, fp16 or fp32, got {image.dtype} and {text.dtype}")
    if image.device != text.device:
        raise ValueError(f"image and text features must be on the same device, got {image.device} and {text.device}")
    _check_scalar("logit_scale", logit_scale, image)
    if exchange not in EXCHANGES:
        raise ValueError(f"unknown exchange {exchange!r}: choose one of {', '.join(EXCHANGES)}")


def _check_scalar(name: str, value: Tensor, features: Tensor) -> None:
    if value.device != features.device:
        raise ValueError(f"features and {name} must be on the same device, got {features.device} and {value.device}")
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"{name} must be a single floating-point number, got shape {tuple(value.shape)}")
