"""The output of data loading: a rank's batch, and the shares of it that worker processes send.

A :class:`Share` may contain images that are still JPEGs; a :class:`Batch` never does. Both are checked when they are
created, and neither changes afterwards.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mc2_hpc.data.dali import Jpegs
from mc2_hpc.data.mixing import LanePosition
from mc2_hpc.data.teacher import TeacherInputs, joined_images, joined_inputs


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples without their images, in lane order."""

    tokens: torch.Tensor
    """int64 ``(b, width)``, see :meth:`mc2_hpc.data.tokenizer.Tokenizer.encode`."""
    lengths: Sequence[int]
    """Tokens of each row up to and including its EOS: known on the host, so that no step has to ask the device."""
    keys: Sequence[str]
    langs: Sequence[str]
    """Empty if the data does not say."""
    sources: Sequence[str]
    """Names of the sources they are from; empty if there is a single one without a name."""
    position: dict[int, LanePosition]
    """Of every lane they come from, after these samples; saved in checkpoints."""
    fields: dict[str, int] = field(default_factory=dict)
    """Samples by caption field, as ``<source>/<field>``, of sources with several (``mc2_hpc.data.caption_fields``)."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Samples and shards skipped before them, by reason (``mc2_hpc.data.skips``)."""
    teacher: TeacherInputs | None = None
    """What a teacher sees of them besides the student's images and token ids; None without a teacher."""

    def __post_init__(self) -> None:
        numbers = {len(self.tokens), *map(len, (self.lengths, self.keys, self.langs, self.sources))}
        assert len(numbers) == 1, "one row of tokens, length, key, language and source per sample"


@dataclass(frozen=True, kw_only=True)
class Batch(Samples):
    """This rank's part of one step."""

    images: torch.Tensor
    """uint8 ``(b, 3, S, S)``, or stored features, float32 ``(b, E)``; pinned if there is a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert len(self.images) == len(self.keys), "one image per sample"


@dataclass(frozen=True, kw_only=True)
class Share(Samples):
    """A worker's part of a batch."""

    pixels: torch.Tensor
    """uint8 ``(m, 3, S, S)``: the decoded images, in order; or stored features, float32 ``(m, E)``."""
    jpegs: Jpegs | None = None
    """The other images, with their places in the batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        encoded = 0 if self.jpegs is None else len(self.jpegs.rows)
        assert len(self.pixels) + encoded == len(self.keys), "one image per sample, decoded or not"


def joined_samples(parts: Sequence[Samples], *, pad_id: int, pin: bool) -> Samples:
    """The samples of all parts, in order, with token rows padded to the widest; in pinned memory if requested."""
    num = sum(len(part.keys) for part in parts)
    width = max(part.tokens.shape[1] for part in parts)
    tokens = torch.full((num, width), pad_id, dtype=torch.int64, pin_memory=pin)
    position: dict[int, LanePosition] = {}
    fields: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    first = 0
    for part in parts:
        tokens[first : first + len(part.keys), : part.tokens.shape[1]] = part.tokens
        first += len(part.keys)
        position |= part.position
        fields.update(part.fields)
        skipped.update(part.skipped)
    return Samples(
        tokens=tokens,
        lengths=[length for part in parts for length in part.lengths],
        keys=[key for part in parts for key in part.keys],
        langs=[lang for part in parts for lang in part.langs],
        sources=[source for part in parts for source in part.sources],
        position=position,
        fields=dict(fields),
        skipped=dict(skipped),
        teacher=joined_inputs([part.teacher for part in parts], pin=pin),
    )


def joined_pixels(shares: Sequence[Share], *, pin: bool) -> torch.Tensor:
    """The decoded images of all shares, in order."""
    return joined_images([share.pixels for share in shares], pin=pin)


def batch_of(samples: Samples, images: torch.Tensor, *, skipped: dict[str, int] | None = None) -> Batch:
    """The batch of samples and their images; ``skipped`` replaces the samples' own."""
    return Batch(
        images=images,
        tokens=samples.tokens,
        lengths=samples.lengths,
        keys=samples.keys,
        langs=samples.langs,
        sources=samples.sources,
        position=samples.position,
        fields=samples.fields,
        skipped=samples.skipped if skipped is None else skipped,
        teacher=samples.teacher,
    )


def join(shares: Sequence[Share], *, pad_id: int, pin: bool) -> Batch:
    """The batch of shares with only decoded images; pinned if requested, so that copies to the GPU overlap."""
    if len(shares) == 1 and not pin:
        return batch_of(shares[0], shares[0].pixels)  # no copy
    return batch_of(joined_samples(shares, pad_id=pad_id, pin=pin), joined_pixels(shares, pin=pin))
