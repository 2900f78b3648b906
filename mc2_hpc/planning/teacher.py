"""The teacher of a planned run: the product's own forward pass, on a model without values and on captions that are
drawn; or the features that are stored of it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc2_hpc.config import RunConfig
from mc2_hpc.data.batches import Batch
from mc2_hpc.data.features import FACTS
from mc2_hpc.data.teacher import TeacherInputs, TeacherNeeds
from mc2_hpc.evaluation.dual_encoders.ours import OurCaptions, OurEncoder
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.models.weights import ModelCard
from mc2_hpc.planning.captions import Captions
from mc2_hpc.precision import Precision
from mc2_hpc.reading.json_file import Foreign, Size, read_json
from mc2_hpc.training.distillation import DistillationTeacher, StoredTeacher

_UNREAD: Any = None
"""The teacher's tokenizer, of which a plan needs nothing."""


class PlannedTeacher(DistillationTeacher):
    """A teacher that is not loaded."""

    def __init__(self, config: RunConfig, arch: ClipArchitecture, clip: CLIP, device: torch.device) -> None:
        """
        Args:
            arch: of the student. A teacher of the same vocabulary and context length sees the student's token ids.
            clip: the teacher, on the device, with the backends of the run.
        """
        assert config.distill is not None
        self._config = config.distill
        self._precision = Precision(config.precision)
        self._device = device
        self._clip = clip.requires_grad_(False)
        self._model = OurEncoder(clip, ModelCard(arch=clip.arch, tokenizer_style=""), _UNREAD)
        same_tokens = _ids(clip.arch) == _ids(arch)
        self._packs = same_tokens and config.model.text_packing
        size = clip.arch.vision.image_size
        self.needs = TeacherNeeds(
            image_size=None if size == arch.vision.image_size else size,
            captions=None if same_tokens else OurCaptions(_UNREAD),
        )

    def parameters(self) -> list[Tensor]:
        """Its weights."""
        return list(self._clip.parameters())

    def inputs(self, captions: Captions) -> TeacherInputs:
        """Its own images and token ids of a batch, where it has any. Which ids costs the same."""
        pairs, width = captions.tokens.shape
        size = self.needs.image_size
        pixels = tokens = None
        if size is not None:
            pixels = torch.empty(pairs, 3, size, size, device=self._device).to(torch.uint8)
        if self.needs.captions is not None:
            text = self._clip.arch.text
            tokens = torch.full((pairs, 1, min(width, text.context_length)), text.eos_id, dtype=torch.int64)
        return TeacherInputs(pixels=pixels, tokens=tokens)


class PlannedFeatures(StoredTeacher):
    """Stored features that are not read."""

    def __init__(self, config: RunConfig, width: int, device: torch.device) -> None:
        """
        Args:
            width: of the features.
        """
        assert config.distill is not None
        self._config = config.distill
        self._dtype = Precision(config.precision).dtype
        self._device = device
        self._width = width

    def inputs(self, captions: Captions) -> TeacherInputs:
        """The features of a batch, in the type that they are stored in."""
        shape = (len(captions.lengths), 2, self._width)
        return TeacherInputs(features=torch.empty(shape, device=self._device).to(self._dtype))


class _Facts(Foreign):
    """What is read of ``features.json``."""

    width: Size


def stored_width(config: RunConfig, arch: ClipArchitecture) -> int:
    """The width of the features in ``distill.features``, or the student's if none are there yet."""
    assert config.distill is not None and config.distill.features is not None
    path = Path(config.distill.features) / FACTS
    return read_json(path, _Facts, what="facts about features").width if path.is_file() else arch.embed_dim


def batch_of(captions: Captions, images: Tensor, teacher: TeacherInputs | None) -> Batch:
    """A batch as the loader makes it, with as much of it as a teacher needs."""
    unnamed = [""] * len(captions.lengths)
    return Batch(
        images=images,
        tokens=captions.tokens,
        lengths=captions.lengths,
        keys=unnamed,
        langs=unnamed,
        sources=unnamed,
        position={},
        teacher=teacher,
    )


def _ids(arch: ClipArchitecture) -> tuple[int, int, int]:
    text = arch.text
    return text.vocab_size, text.eos_id, text.context_length
