"""What a teacher sees of a batch, where that differs from what the student sees; or its features, computed before.

A teacher of another image size gets the same crop of every image, resized from the same pixels to its own size. A
teacher with another tokenizer gets its own token ids. Both are made by the loader's workers, which also read features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from mc2_hpc.errors import UserError


class TwoSizes(NamedTuple):
    """A crop resized to the student's and to the teacher's size, uint8 ``(3, size, size)`` each."""

    student: torch.Tensor
    teacher: torch.Tensor


class CaptionEncoder(Protocol):
    """Turns captions into the inputs of a model's text tower; sent to the worker processes, so it must be picklable."""

    @property
    def pads(self) -> Sequence[int]:
        """What fills a row of each input of the text tower after the caption; K values."""

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """int64 ``(len(texts), K, width)``: K inputs of the text tower, such as token ids and an attention mask."""


@dataclass(frozen=True, kw_only=True)
class TeacherInputs:
    """A teacher's own images and token ids of some samples, in their order; B samples, K inputs of its text tower."""

    pixels: torch.Tensor | None = None
    """uint8 ``(B, 3, T, T)``; None: the student's images."""
    tokens: torch.Tensor | None = None
    """int64 ``(B, K, width)``; None: the student's token ids."""
    features: torch.Tensor | None = None
    """``(B, 2, E)``: stored features of the images and of the captions, in place of both; None: they are computed."""
    pads: Sequence[int] = ()
    """What fills a row of each of the K inputs after the caption; empty without ``tokens``."""

    def tensors(self) -> list[torch.Tensor]:
        """The images, the token ids and the features, or those of them that it has."""
        return [tensor for tensor in (self.pixels, self.tokens, self.features) if tensor is not None]


@dataclass(frozen=True, kw_only=True)
class TeacherNeeds:
    """How workers make :class:`TeacherInputs`."""

    image_size: int | None = None
    """T; None: the student's images serve the teacher too."""
    captions: CaptionEncoder | None = None
    """None: the student's token ids serve the teacher too."""
    features: str | None = None
    """Folder of its features (:mod:`mc2_hpc.data.features`), in place of images and token ids."""

    def check(self, decode: str) -> None:
        """
        Raises:
            UserError: the decode backend cannot resize a crop to two sizes.
        """
        if self.image_size is not None and decode == "dali":
            raise UserError(
                "data.decode=dali resizes to one size, but distill.teacher takes images of "
                f"{self.image_size} pixels: choose turbo, or a teacher of the student's image size"
            )

    def inputs(self, texts: Sequence[str], made: Sequence[torch.Tensor]) -> TeacherInputs:
        """The inputs of samples with these captions.

        Args:
            made: their images in the teacher's size, if it has its own; or their features (2, E), if those are stored.
        """
        if self.features is not None:
            return TeacherInputs(features=torch.stack(list(made)))
        return TeacherInputs(
            pixels=None if self.image_size is None else torch.stack(list(made)),
            tokens=None if self.captions is None else self.captions(texts),
            pads=() if self.captions is None else self.captions.pads,
        )


def joined_inputs(parts: Sequence[TeacherInputs | None], *, pin: bool) -> TeacherInputs | None:
    """The inputs of all parts, in order; in pinned memory if requested. None if there is no teacher."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    pixels = [part.pixels for part in known if part.pixels is not None]
    tokens = [part.tokens for part in known if part.tokens is not None]
    features = [part.features for part in known if part.features is not None]
    return TeacherInputs(
        pixels=joined_images(pixels, pin=pin) if pixels else None,
        tokens=_joined_tokens(tokens, known[0].pads, pin=pin) if tokens else None,
        features=joined_images(features, pin=pin) if features else None,
        pads=known[0].pads,
    )


def joined_images(parts: Sequence[torch.Tensor], *, pin: bool) -> torch.Tensor:
    """The images of all parts, at least one, in order; copied once, into pinned memory if requested."""
    num, like = sum(map(len, parts)), parts[0]
    return torch.cat(list(parts), out=torch.empty((num, *like.shape[1:]), dtype=like.dtype, pin_memory=pin))


def _joined_tokens(parts: Sequence[torch.Tensor], pads: Sequence[int], *, pin: bool) -> torch.Tensor:
    num, width = sum(map(len, parts)), max(part.shape[2] for part in parts)
    joined = torch.empty((num, len(pads), width), dtype=torch.int64, pin_memory=pin)
    joined.copy_(torch.tensor(pads)[None, :, None])
    first = 0
    for part in parts:
        joined[first : first + len(part), :, : part.shape[2]] = part
        first += len(part)
    return joined
