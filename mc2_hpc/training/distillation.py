"""The teacher of a run: a frozen model, whole on every rank, that encodes the pairs the student learns from; or its
features, which ``mc2 features --teacher`` has computed.

It belongs to neither DeepSpeed nor the checkpoints. A teacher of the student's image size sees the student's images;
otherwise, and if it has another tokenizer, the loader's workers make its inputs (``mc2_hpc.data.teacher``).
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mc2_hpc.config import RunConfig
from mc2_hpc.data.batches import Batch
from mc2_hpc.data.features import FeatureFacts, check_facts, teacher_of
from mc2_hpc.data.teacher import TeacherNeeds
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.distributed import Ranks, first_error
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders import DualEncoder, open_dual_encoder
from mc2_hpc.evaluation.dual_encoders.ours import OurEncoder
from mc2_hpc.evaluation.dual_encoders.protocol import TeachingEncoder
from mc2_hpc.kernels.contrastive import Teacher
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.precision import Precision
from mc2_hpc.storage import file_sha256

logger = logging.getLogger(__name__)


class DistillationTeacher:
    """The model that ``distill.teacher`` names, on this rank's device."""

    def __init__(self, config: RunConfig, arch: ClipArchitecture, tokenizer: Tokenizer, ranks: Ranks) -> None:
        """Load the teacher. Collective.

        Args:
            arch, tokenizer: of the student.

        Raises:
            UserError: no model can be loaded there, it takes no square images, or the ranks find different models.
        """
        assert config.distill is not None
        self._config = config.distill
        self._precision = Precision(config.precision)
        self._device = ranks.device
        self._model = load_teacher(config.distill.teacher, config, ranks)
        self.identity = self._model.identity
        """SHA-256 of its weights, tokenizer and preprocessing, equal on all ranks."""
        check_same(f"distill.teacher={config.distill.teacher}", self.identity, ranks)
        facts, captions = self._model.facts, self._model.captions
        same_images = facts.image_size == arch.vision.image_size
        same_tokens = isinstance(self._model, OurEncoder) and _same(self._model.tokenizer, tokenizer)
        self._packs = same_tokens and config.model.text_packing
        self.needs = TeacherNeeds(
            image_size=None if same_images else facts.image_size, captions=None if same_tokens else captions
        )
        """What the loader makes for it."""
        if ranks.is_first:
            logger.info(
                "teacher %s: %s parameters, %d pixels, %s",
                config.distill.teacher,
                f"{facts.parameters:,}",
                facts.image_size,
                "the student's token ids" if same_tokens else "its own token ids",
            )

    @torch.no_grad()
    def features(self, batch: Batch, images: Tensor) -> Teacher:
        """Its features of a batch, in the type of the features that enter the loss.

        Args:
            images: of the batch, on the device.
        """
        inputs = batch.teacher
        tokens = batch.tokens[:, None]
        if self.needs.image_size is not None:
            assert inputs is not None and inputs.pixels is not None, "the loader makes images of the teacher's size"
            images = inputs.pixels.to(self._device, non_blocking=True)
        if self.needs.captions is not None:
            assert inputs is not None and inputs.tokens is not None, "the loader makes the teacher's token ids"
            tokens = inputs.tokens
        tokens = tokens.to(self._device, non_blocking=True)
        size = self._config.micro_batch or max(1, len(images))
        with self._precision.autocast(self._device):
            image_parts = [self._model.encode_pixels(part) for part in images.split(size)]
            text_parts = [
                self._of_texts(part, batch.lengths[start : start + size])
                for start, part in zip(range(0, len(tokens), size), tokens.split(size), strict=True)
            ]
        return Teacher(
            torch.cat(image_parts).to(self._precision.dtype),
            torch.cat(text_parts).to(self._precision.dtype),
            scale=self._config.scale,
            weight=self._config.weight,
        )

    def _of_texts(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """
        Args:
            lengths: of the captions in the student's token ids.
        """
        if self._packs:
            assert isinstance(self._model, OurEncoder)
            return self._model.encode_tokens(tokens, lengths)
        return self._model.encode_tokens(tokens)


class StoredTeacher:
    """The features in ``distill.features``, which the loader reads with the samples."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        """Collective.

        Raises:
            UserError: no features of a teacher are there, they are of other preprocessing than this run's, or the ranks
                find those of different models.
        """
        assert config.distill is not None and config.distill.features is not None
        self._config = config.distill
        self._dtype = Precision(config.precision).dtype
        self._device = ranks.device
        folder, self.identity, error = Path(config.distill.features), "", None
        try:
            self.identity = teacher_of(folder)
            check_facts(folder, FeatureFacts.of(config.data, config.precision))
        except UserError as failure:
            error = failure
        first_error(error)
        check_same(f"distill.features={folder}", self.identity, ranks)
        self.needs = TeacherNeeds(features=config.distill.features)
        if ranks.is_first:
            logger.info("features of the teacher with SHA-256 %s... from %s", self.identity[:12], folder)

    def features(self, batch: Batch, images: Tensor) -> Teacher:
        """As :meth:`DistillationTeacher.features`."""
        assert batch.teacher is not None and batch.teacher.features is not None, "the loader reads them"
        image, text = batch.teacher.features.to(self._device, self._dtype, non_blocking=True).unbind(1)
        return Teacher(image.contiguous(), text.contiguous(), scale=self._config.scale, weight=self._config.weight)


def load_teacher(source: str, config: RunConfig, ranks: Ranks) -> TeachingEncoder:
    """The model at ``source`` on this rank's device, frozen, with the backends of a run. Collective.

    Raises:
        UserError: no model can be loaded there, or it takes no square images.
    """
    found: DualEncoder | None = None
    error: Exception | None = None
    try:
        found = _able_to_teach(source, open_dual_encoder(source, ranks.device))
    except Exception as failure:  # whatever it is, the other ranks must know
        error = failure
    first_error(error)
    assert isinstance(found, TeachingEncoder)
    found.model.requires_grad_(False)
    if isinstance(found, OurEncoder):
        found.model.set_backends(config.model, ranks.device.type)
    return found


def check_same(name: str, identity: str, ranks: Ranks) -> None:
    """Check that all ranks have loaded the same teacher. Collective.

    Args:
        name: of the teacher, and of what sets it, for the message.
        identity: SHA-256 of the files that this rank has read.

    Raises:
        UserError: they have not.
    """
    found: list[str] = [""] * ranks.world_size
    dist.all_gather_object(found, identity)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise UserError(
                f"{name}: ranks 0 and {rank} find different models there (SHA-256 {found[0][:12]}... "
                f"and {other[:12]}...); put the same files on every machine, or name a folder that they share"
            )


def _able_to_teach(name: str, model: DualEncoder) -> DualEncoder:
    if not isinstance(model, TeachingEncoder):
        raise UserError(f"{name}: a model of format {model.facts.format} cannot be a teacher; name the one it is from")
    if model.facts.resize == "patches":
        raise UserError(f"{name}: takes images in their own shape, so it cannot be a teacher")
    return model


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same token ids, cut at the same length."""
    return (
        one.style == other.style
        and one.context_length == other.context_length
        and file_sha256(one.model_file) == file_sha256(other.model_file)
    )
