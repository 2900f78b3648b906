"""Token ids of a step, drawn for planning: for this rank in full, for the others what they ask of this rank.

Lengths are spread evenly from half the mean to one and a half times the mean. Ids follow Zipf's law over the whole
vocabulary (id *r* with probability proportional to 1 / *r*), as in docs/step.md: natural captions repeat more, so a
plan exchanges somewhat more rows of the token table than a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MEAN_TOKENS = 18.0
"""Tokens per caption, with begin and end: the mean of Multi30k's captions in four languages (docs/step.md)."""
_SPECIAL = 4


@dataclass(kw_only=True)
class Captions:
    """The captions of a step."""

    tokens: Tensor
    """(b, L) ids of this rank's captions, int64 on the host."""
    lengths: list[int]
    """Tokens of each, up to its end."""
    asked: list[np.ndarray]
    """For each rank, the sorted different ids of its captions that rank 0 owns."""
    _knows_counts: bool = False

    def answer(self, output: Tensor, given: Tensor) -> None:
        """Fill the output of this rank's all-to-alls between hosts, which alternate: how many rows each rank asks for,
        then which (:meth:`mc2_hpc.training.row_exchange.RowExchange.plan`)."""
        self._knows_counts = not self._knows_counts
        if self._knows_counts:
            output.copy_(torch.tensor([len(ids) for ids in self.asked]))
        else:
            output.copy_(torch.from_numpy(np.concatenate(self.asked) // len(self.asked)))


def captions_of(batches: Sequence[Tensor], eos_id: int) -> Captions:
    """The captions of a step whose ids are known: ``batches[k]`` has those of rank k, (b_k, L)."""
    from mc2_hpc.models.packed_captions import caption_lengths

    world_size = len(batches)
    ids = [np.unique(batch.numpy()) for batch in batches]
    return Captions(
        tokens=batches[0],
        lengths=caption_lengths(batches[0], eos_id),
        asked=[each[each % world_size == 0] for each in ids],
    )


def draw_captions(
    batches: Sequence[int], *, mean: float, vocab_size: int, context_length: int, eos_id: int, seed: int = 0
) -> Captions:
    """Captions of ranks with these numbers of pairs.

    Args:
        mean: tokens per caption; no caption is longer than the context.
    """
    rng = np.random.default_rng(seed)
    own = _lengths(batches[0], mean, context_length)
    weights = 1.0 / np.arange(_SPECIAL, vocab_size + _SPECIAL)
    cumulative = np.cumsum(weights / weights.sum())

    def ids(count: int) -> np.ndarray:
        return np.minimum(np.searchsorted(cumulative, rng.random(count)), vocab_size - 1)

    tokens = np.full((len(own), max(own)), eos_id, dtype=np.int64)
    for row, length in zip(tokens, own, strict=True):
        drawn = ids(length - 1)
        row[: length - 1] = np.where(drawn == eos_id, vocab_size - 1, drawn)
    asked = [np.unique(tokens)]
    clipped = sum(own) / len(own)
    asked += [np.unique(np.append(ids(round(pairs * clipped)), eos_id)) for pairs in batches[1:]]
    return Captions(
        tokens=torch.from_numpy(tokens), lengths=own, asked=[each[each % len(batches) == 0] for each in asked]
    )


def _lengths(pairs: int, mean: float, context_length: int) -> list[int]:
    spread = np.linspace(0.5 * mean, 1.5 * mean, pairs) if pairs > 1 else np.array([mean])
    return [int(length) for length in np.clip(np.round(spread), 2, context_length)]
