"""The autograd function around an exchange and a backend."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .shared_batch import SharedBatch
from .tiles import TileFactory, paired_dots


@dataclass(frozen=True)
class Plan:
    """How one call is computed: with which tiles, exchange and ranks."""

    make_tiles: TileFactory
    exchange: ModuleType
    shared: SharedBatch


class ContrastiveLoss(torch.autograd.Function):
    """Global mean loss; each rank's gradient is ``shared.size`` times its part, so that the average is exact."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, plan: Plan) -> Tensor:
        image, text = image.contiguous(), text.contiguous()
        dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
        scale = logit_scale.detach().to(dtype).reshape(()).exp()
        row_lse, own_col_lse, texts, col_lse = plan.exchange.forward(plan.make_tiles, image, text, scale, plan.shared)
        ctx.save_for_backward(image, texts, scale, row_lse, col_lse)
        ctx.plan = plan
        ctx.logit_scale_like = (logit_scale.shape, logit_scale.dtype)

        # The terms may be large while their differences are small: subtract before summing.
        pairs = paired_dots(image, text, dtype) * scale
        local = ((row_lse - pairs) + (own_col_lse - pairs)).double().sum() / (2 * plan.shared.global_batch)
        loss = plan.shared.sum(local).to(dtype)
        return torch.where(torch.isfinite(loss), loss, torch.nan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        image, texts, scale, row_lse, col_lse = ctx.saved_tensors
        plan, (needs_image, needs_text, needs_scale, _) = ctx.plan, ctx.needs_input_grad
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
                shape, dtype = ctx.logit_scale_like
                scale_grad = paired_dots(image_grad, image, scale.dtype).double().sum().to(dtype).reshape(shape)
        return (
            image_grad.to(image.dtype) if needs_image else None,
            text_grad.to(image.dtype) if needs_text else None,
            scale_grad,
            None,
        )
