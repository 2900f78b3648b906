"""One training step: the exact contrastive loss of the global batch, in as many micro-batches as memory requires."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mc2_hpc.config import LossConfig, RunConfig
from mc2_hpc.data.lanes import rank_batches
from mc2_hpc.errors import UserError
from mc2_hpc.kernels.contrastive import Teacher, contrastive_loss, distilled_contrastive_loss, sigmoid_loss
from mc2_hpc.kernels.contrastive.dispatch import choose_backend
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.votes import Votes


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The results of one step. Tensors are on the device; :meth:`numbers` is what the host reads of them."""

    loss: Tensor
    """Global mean loss before the update, 0-d fp32, equal on all ranks."""
    grad_norm: Tensor
    """Norm of the averaged gradients, 0-d."""
    logit_scale: Tensor
    """The multiplier after the update, 0-d; ``grad_norm`` does not include its gradient."""
    votes: Tensor
    """Number of ranks that said yes to each of :class:`Votes`; read by :class:`VoteCounts`."""
    divergence: Tensor | None = None
    """Global mean divergence from the teacher, 0-d, part of ``loss``; None without a teacher."""
    logit_bias: Tensor | None = None
    """The sigmoid loss's bias after the update, 0-d; None with the softmax."""

    def numbers(self) -> Tensor:
        """Loss, gradient norm, logit scale, then what there is of divergence from the teacher and logit bias, and
        votes, in fp32 on the device of the loss."""
        scalars = [self.loss, self.grad_norm.to(self.loss.device, non_blocking=True), self.logit_scale]
        scalars += [number for number in (self.divergence, self.logit_bias) if number is not None]
        return torch.cat([*(number.float().reshape(1) for number in scalars), self.votes.float()])


def check_loss(config: LossConfig, device: torch.device) -> None:
    """Check early whether the configured loss can run on ``device``.

    Raises:
        UserError: its backend cannot.
    """
    if config.backend == "auto":
        return  # it runs everywhere
    try:
        choose_backend(config.backend, device, torch.float32)
    except RuntimeError as error:
        raise UserError(f"loss.backend={config.backend}: {error}") from None


def num_micro_batches(config: RunConfig, world_size: int) -> int:
    """Backward passes per step: the largest share of a rank over ``micro_batch``, rounded up; equal on all ranks.

    Raises:
        UserError: more ranks than lanes, or a rank would have fewer pairs than passes.
    """
    batches = rank_batches(config.global_batch, lanes=config.data.lanes, num_ranks=world_size)
    largest, smallest = max(batches), min(batches)
    if config.micro_batch == 0:
        return 1
    num_micro = -(-largest // config.micro_batch)
    if num_micro > smallest:
        raise UserError(f"micro_batch={config.micro_batch} makes {num_micro} passes of {smallest} pairs: raise it")
    return num_micro


class ContrastiveStep:
    """Binds the engine and the loss.

    With one micro-batch the loss is differentiated directly. With several, all features are first computed without
    graphs, and the loss of the *whole* batch gives the gradient of every feature. Each micro-batch is then encoded
    again and backpropagated with its share of these gradients. This is GradCache (Gao et al. 2021, arXiv 2101.06983):
    the same loss and gradients as one large batch, at the cost of a second forward pass. The patches that are computed
    are given, so both passes compute the same features. A tower that is wholly frozen is not encoded again.
    """

    def __init__(
        self,
        engine: Engine,
        config: LossConfig,
        *,
        feature_dtype: torch.dtype,
        batches: Sequence[int] | None = None,
        votes: Callable[[], Votes] = Votes,
    ) -> None:
        """
        Args:
            batches: pairs of every rank in each step (:func:`mc2_hpc.data.lanes.rank_batches`); ``None`` exchanges them
                in every step, which waits for the device.
            votes: called late in every step for this rank's answers (see :meth:`Engine.step`).
        """
        self._engine = engine
        self._config = config
        self._feature_dtype = feature_dtype
        self._batches = batches
        self._votes = votes

    def __call__(
        self,
        images: Tensor,
        tokens: Tensor,
        lr: float,
        *,
        lengths: Sequence[int] | None = None,
        kept: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> StepResult:
        """Encode (b, 3, S, S) uint8 images and (b, L) token ids, differentiate, update with learning rate ``lr``.

        The token ids should be on the host: see :meth:`Engine.look_up`.

        Args:
            lengths: of the captions, which are then computed without their padding.
            kept: (b, K) int64, the patches of each image that are computed; ``None`` is all of them.
            teacher: its features of these pairs, in the type of the features that enter the loss.
        """
        tokens = self._engine.look_up(tokens)
        if self._engine.num_micro == 1:
            loss, divergence = self._loss(*self._engine.features(images, tokens, lengths, kept), teacher)
            self._engine.backward(loss)
        else:
            loss, divergence = self._cached(images, tokens, lengths, kept, teacher)
        grad_norm, votes = self._engine.step(lr, self._votes())
        bias = self._engine.logit_bias
        return StepResult(
            loss=loss.detach(),
            grad_norm=grad_norm,
            logit_scale=self._engine.logit_scale.detach().exp(),
            votes=votes,
            divergence=divergence,
            logit_bias=None if bias is None else bias.detach().clone(),
        )

    def _loss(
        self, image_features: Tensor, text_features: Tensor, teacher: Teacher | None
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and the divergence from the teacher, if there is one, without a gradient."""
        image_features, text_features = image_features.to(self._feature_dtype), text_features.to(self._feature_dtype)
        scale = self._engine.logit_scale
        options: dict[str, Any] = {
            "batches": self._batches,
            "backend": self._config.backend,
            "exchange": self._config.exchange,
        }
        if (bias := self._engine.logit_bias) is not None:
            return sigmoid_loss(image_features, text_features, scale, bias, **options), None
        if teacher is None:
            return contrastive_loss(image_features, text_features, scale, **options), None
        loss, terms = distilled_contrastive_loss(image_features, text_features, scale, teacher, **options)
        return loss, terms[1]

    def _cached(
        self,
        images: Tensor,
        tokens: Tensor,
        lengths: Sequence[int] | None,
        kept: Tensor | None,
        teacher: Teacher | None,
    ) -> tuple[Tensor, Tensor | None]:
        # tensor_split gives every rank the same number of pieces, whatever the size of its share.
        image_pieces, token_pieces = (whole.tensor_split(self._engine.num_micro) for whole in (images, tokens))
        rest = iter(lengths or ())
        length_pieces = [tuple(islice(rest, len(piece))) if lengths else None for piece in token_pieces]
        kept_pieces = [None] * self._engine.num_micro if kept is None else kept.tensor_split(self._engine.num_micro)
        pieces = list(zip(image_pieces, token_pieces, length_pieces, kept_pieces, strict=True))
        encoded = [self._engine.features_only(*piece) for piece in pieces]
        image_features = torch.cat([image for image, _ in encoded]).requires_grad_(self._engine.trains_images)
        text_features = torch.cat([text for _, text in encoded]).requires_grad_(self._engine.trains_texts)
        loss, divergence = self._loss(image_features, text_features, teacher)
        loss.backward()
        image_grads, text_grads = (self._shares(features) for features in (image_features, text_features))
        for piece, image_grad, text_grad in zip(pieces, image_grads, text_grads, strict=True):
            self._engine.backward_again(*piece, image_grad, text_grad)
        return loss, divergence

    def _shares(self, features: Tensor) -> Sequence[Tensor | None]:
        """The gradient of each micro-batch's features; ``None`` if their tower is frozen."""
        if not features.requires_grad:
            return [None] * self._engine.num_micro
        assert features.grad is not None
        return features.grad.tensor_split(self._engine.num_micro)
