"""The autograd functions around an exchange and a backend."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import accumulator_dtype
from .shared_batch import SharedBatch
from .statistics import DistilledStatistics, Kept, RowSums, Statistics, finite
from .teacher import Teacher, side_by_side
from .tiles import TileFactory, paired_dots


class Exchange(Protocol):
    """How ranks see each other's texts. W is the width of a row: D, or D + E with a teacher."""

    def forward(
        self, make_tiles: TileFactory, image_bD: Tensor, text_bD: Tensor, scale: Tensor, shared: SharedBatch
    ) -> tuple[Kept, Tensor, Kept, slice]:
        """Statistics of the own rows (b), texts to keep for backward (n, W), the statistics of their columns (n), and
        which of these columns are this rank's."""

    def backward(
        self,
        make_tiles: TileFactory,
        image_bD: Tensor,
        text_ND: Tensor,
        scale: Tensor,
        row_lse: Tensor,
        col_lse: Tensor,
        shared: SharedBatch,
        needs_image: bool,
        needs_text: bool,
    ) -> tuple[Tensor | None, Tensor | None, float]:
        """(G T (b, D), G^T I of the own texts (b, D), the factor G was scaled by)."""


@dataclass(frozen=True)
class Plan:
    """How one call is computed: with which tiles, exchange and ranks."""

    make_tiles: TileFactory
    exchange: Exchange
    shared: SharedBatch


class ContrastiveLoss(torch.autograd.Function):
    """Global mean loss; each rank's gradient is ``shared.size`` times its part, so that the average is exact."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, plan: Plan) -> Tensor:
        found = _forward(ctx, image.contiguous(), text.contiguous(), logit_scale, plan, image.shape[1])
        local = _cross_entropies(found.row_lse, found.col_lse, found.pairs) / (2 * plan.shared.global_batch)
        return finite(plan.shared.sum(local).to(found.pairs.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, grad_output), None)


class DistilledContrastiveLoss(torch.autograd.Function):
    """The same with a teacher: the weighted sum, and its two terms (2,), contrastive first, without a gradient."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, plan: Plan, teacher: Teacher
    ) -> tuple[Tensor, Tensor]:
        images = side_by_side(image, teacher.image_features)
        texts = side_by_side(text, teacher.text_features)
        found = _forward(ctx, images, texts, logit_scale, plan, image.shape[1])
        assert isinstance(found.rows, DistilledStatistics) and isinstance(found.columns, DistilledStatistics)
        local = torch.stack(
            (
                _cross_entropies(found.row_lse[:, 0], found.col_lse[:, 0], found.pairs),
                (found.rows.divergence() + found.columns.divergence()).double().sum(),
            )
        )
        terms = finite(plan.shared.sum(local / (2 * plan.shared.global_batch)))
        ctx.factor = 1 + teacher.weight
        loss = (terms[0] + teacher.weight * terms[1]).to(found.pairs.dtype)
        terms = terms.to(found.pairs.dtype)
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, grad_output * ctx.factor), None, None)


class SigmoidLoss(torch.autograd.Function):
    """The sigmoid loss, with gradients by the same convention; the fourth input is the bias."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, plan: Plan) -> Tensor:
        image, text = image.contiguous(), text.contiguous()
        dtype, shared = accumulator_dtype(image.dtype), plan.shared
        scale = logit_scale.detach().to(dtype).reshape(()).exp()
        rows, texts, _, _ = plan.exchange.forward(plan.make_tiles, image, text, scale, shared)
        assert isinstance(rows, RowSums)
        pairs = paired_dots(image, text, dtype) * scale + logit_bias.detach().to(dtype).reshape(())
        softplus, sigmoid = rows.total.double().unbind(1)
        # A loss of 0 must not hide an infinite logit; a feature that is not finite makes its own pair's logit so.
        of_pairs = torch.where(torch.isfinite(pairs), F.softplus(-pairs.double(), threshold=1000.0), torch.nan)
        none = pairs.new_empty(len(pairs), 0), pairs.new_empty(len(texts), 0)
        ctx.save_for_backward(image, texts, scale, *none)
        # sum_ij G_ij of the own rows
        ctx.of_bias = (sigmoid - torch.sigmoid(-pairs.double())).sum()
        ctx.plan, ctx.width = plan, image.shape[1]
        ctx.logit_scale_like = (logit_scale.shape, logit_scale.dtype)
        ctx.logit_bias_like = (logit_bias.shape, logit_bias.dtype)
        return finite(shared.sum((softplus + of_pairs).sum() / shared.global_batch).to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward(ctx, 2 * grad_output)
        bias_grad = None
        if ctx.needs_input_grad[3]:
            shape, dtype = ctx.logit_bias_like
            factor = grad_output.double() * (ctx.plan.shared.size / ctx.plan.shared.global_batch)
            bias_grad = (ctx.of_bias * factor).to(dtype).reshape(shape)
        return (*gradients, bias_grad, None)


class _Forward(NamedTuple):
    """Of this rank's rows and columns (b)."""

    rows: Statistics
    columns: Statistics
    row_lse: Tensor
    col_lse: Tensor
    pairs: Tensor
    """Logits of the positive pairs."""


def _forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, plan: Plan, width: int) -> _Forward:
    dtype = accumulator_dtype(image.dtype)
    scale = logit_scale.detach().to(dtype).reshape(()).exp()
    rows, texts, columns, own = plan.exchange.forward(plan.make_tiles, image, text, scale, plan.shared)
    assert isinstance(rows, Statistics) and isinstance(columns, Statistics)
    row_lse, col_lse = rows.logsumexp(), columns.logsumexp()
    ctx.save_for_backward(image, texts, scale, row_lse, col_lse)
    ctx.plan = plan
    ctx.width = width
    ctx.logit_scale_like = (logit_scale.shape, logit_scale.dtype)
    pairs = paired_dots(image[:, :width], text[:, :width], dtype) * scale
    return _Forward(rows, columns[own], row_lse, col_lse[own], pairs)


def _cross_entropies(row_lse: Tensor, col_lse: Tensor, pairs: Tensor) -> Tensor:
    """Sum over the own rows and columns, in fp64."""
    # The terms may be large while their differences are small: subtract before summing.
    return ((row_lse - pairs) + (col_lse - pairs)).double().sum()


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    image, texts, scale, row_lse, col_lse = ctx.saved_tensors
    plan, (needs_image, needs_text, needs_scale, *_) = ctx.plan, ctx.needs_input_grad
    with torch.autocast(image.device.type, enabled=False):
        # The scale's gradient follows from the images': sum_ij G_ij S_ij = s sum_i <(G T)_i, I_i>.
        image_grad, text_grad, held_at = plan.exchange.backward(
            plan.make_tiles,
            image,
            texts,
            scale,
            row_lse,
            col_lse,
            plan.shared,
            needs_image or needs_scale,
            needs_text,
        )
        factor = grad_output.to(scale.dtype) * scale * (plan.shared.size / (2 * plan.shared.global_batch * held_at))
        for grad in (image_grad, text_grad):
            if grad is not None:
                grad.mul_(factor)
        scale_grad = None
        if needs_scale:
            assert image_grad is not None
            shape, dtype = ctx.logit_scale_like
            dots = paired_dots(image_grad, image[:, : ctx.width], scale.dtype)
            scale_grad = dots.double().sum().to(dtype).reshape(shape)
    return (
        image_grad.to(image.dtype) if needs_image and image_grad is not None else None,
        text_grad.to(image.dtype) if needs_text and text_grad is not None else None,
        scale_grad,
    )
