"""A teacher of the contrastive loss: its features, and how they enter the loss."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Teacher:
    """A teacher's features of the pairs that the student encodes; they get no gradient."""

    image_features: Tensor
    """(b, E) of this rank's pairs, in the type of the student's features; E may differ from the student's width."""
    text_features: Tensor
    """(b, E)."""
    scale: float = 200.0
    """The factor applied to the teacher's dot products: its inverse temperature. 200 is that of Meta CLIP 2's release;
    it sharpens the teacher, which was trained with at most 100."""
    weight: float = 1.0
    """Of the divergence, relative to the contrastive loss."""

    def check(self, image_features: Tensor) -> None:
        """Raise ``ValueError`` if the teacher does not fit the student's image features."""
        image, text = self.image_features, self.text_features
        if image.ndim != 2 or image.shape != text.shape or len(image) != len(image_features) or image.shape[1] == 0:
            raise ValueError(
                f"a teacher's image and text features must both be ({len(image_features)}, width) like the student's, "
                f"got {tuple(image.shape)} and {tuple(text.shape)}"
            )
        if {image.dtype, text.dtype} != {image_features.dtype}:
            raise ValueError(
                f"a teacher's features must have the student's type {image_features.dtype}, got {image.dtype} and "
                f"{text.dtype}"
            )
        if {image.device, text.device} != {image_features.device}:
            raise ValueError(
                f"a teacher's features must be on the student's device {image_features.device}, got {image.device} and "
                f"{text.device}"
            )
        for name, value in (("scale", self.scale), ("weight", self.weight)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"a teacher's {name} must be positive and finite, got {value}")


@dataclass(frozen=True)
class Distillation:
    """How tiles compute with a teacher, whose features follow the student's in every row of images and texts."""

    width: int
    """Of the student's features, D; the rest of a row is the teacher's."""
    scale: float
    """As in :class:`Teacher`."""
    share: float
    """weight / (1 + weight): the teacher's part of G, which is thereby bounded by 2, as without a teacher."""

    @classmethod
    def of(cls, teacher: Teacher, width: int) -> "Distillation":
        return cls(width=width, scale=teacher.scale, share=teacher.weight / (1 + teacher.weight))

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's features, (n, D) and (n, E), of (n, D + E) rows."""
        return rows[:, : self.width], rows[:, self.width :]


def side_by_side(student: Tensor, teacher: Tensor) -> Tensor:
    """(n, D + E) rows of both models' features, contiguous: exchanged and cut into tiles as one tensor."""
    return torch.cat((student.detach(), teacher.detach()), dim=1)
