"""Captions of a batch one after another, without padding: which row of the text tower holds which token.

Shape suffixes: B captions, L longest caption of the batch, T tokens of all captions, P positions of a table, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST_PADDING = 0.02
"""Fewest padded places per token at which packing pays: gathering rows for the attention takes time too."""
LEAST_PLACES = 64
"""Fewest padded places at which packing pays: its extra operations cost something even for few tokens."""


@dataclass(frozen=True, eq=False)
class Packing:
    """The layout of packed captions: where each token comes from, and which tokens may attend to which.

    Tensors are int64 on the device, except for ``starts``; all are computed on the host, so nothing here waits for the
    device.
    """

    lengths: tuple[int, ...]
    """Tokens of each caption, up to and including its first EOS."""
    sources_T: Tensor
    """Place of each packed token in the flattened (B, width) token ids."""
    positions_T: Tensor
    """Position of each packed token in its own caption."""
    last_B: Tensor
    """Packed row of each caption's EOS."""
    starts: Tensor
    """int32 (B + 1,): packed row at which each caption begins, and then T."""
    windows_BL: Tensor
    """L consecutive packed rows for each caption, from its first. Those beyond its EOS are rows of other captions,
    which do not affect it under a causal mask."""
    places_T: Tensor
    """Place of each packed token in the flattened ``windows_BL``."""


def caption_lengths(tokens_BL: Tensor, eos_id: int) -> list[int]:
    """Tokens of each caption up to and including its first EOS, from (B, L) token ids on the CPU with one in each row.

    The tokens after it affect no embedding: the mask is causal, and the tower reads only the EOS.
    """
    return ((tokens_BL == eos_id).int().argmax(dim=1) + 1).tolist()


def packing_pays(lengths: Sequence[int], width: int) -> bool:
    """Whether computing only the captions' own tokens is faster than (len(lengths), width) padded rows."""
    tokens = sum(lengths)
    return len(lengths) * width - tokens >= max(LEAST_PADDING * tokens, LEAST_PLACES)


def pack(lengths: Sequence[int], width: int, device: torch.device) -> Packing:
    """The packing of captions that are padded to ``width``. On a GPU it arrives by one asynchronous copy.

    Raises:
        ValueError: a length is not between 1 and ``width``, or there are none.
    """
    if not lengths or min(lengths) < 1 or max(lengths) > width:
        raise ValueError(f"captions of {list(lengths)} tokens: needs lengths from 1 to {width}")
    lengths_B = np.asarray(lengths, dtype=np.int64)
    ends_B = np.cumsum(lengths_B)
    starts_B = ends_B - lengths_B
    total, longest = int(ends_B[-1]), int(lengths_B.max())
    captions_T = np.repeat(np.arange(len(lengths_B)), lengths_B)
    positions_T = np.arange(total) - starts_B[captions_T]
    windows_BL = np.minimum(starts_B[:, None] + np.arange(longest), total - 1)
    parts = (
        captions_T * width + positions_T,
        positions_T,
        ends_B - 1,
        np.append(starts_B, total),
        windows_BL.ravel(),
        captions_T * longest + positions_T,
    )
    host = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        host = host.pin_memory()
    sources_T, positions, last_B, starts, windows, places_T = host.to(device, non_blocking=True).split(
        [len(part) for part in parts]
    )
    return Packing(
        lengths=tuple(lengths),
        sources_T=sources_T,
        positions_T=positions,
        last_B=last_B,
        starts=starts.int(),
        windows_BL=windows.view(len(lengths_B), longest),
        places_T=places_T,
    )


class PositionRows(torch.autograd.Function):
    """The rows of a table (P, W) at the positions of packed tokens, (T, W).

    Positions repeat in every caption. To add up their gradients, torch's look-up takes atomics on a GPU if the table is
    short (2.11), in an order that differs between runs. Here they are spread to one window per caption and summed.
    """

    @staticmethod
    def forward(ctx: Any, table_PW: Tensor, packing: Packing) -> Tensor:
        ctx.save_for_backward(packing.places_T)
        ctx.num_positions, ctx.shape_BL = len(table_PW), packing.windows_BL.shape
        return table_PW.index_select(0, packing.positions_T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places_T,), (captions, longest) = ctx.saved_tensors, ctx.shape_BL
        (grad_TW,) = gradients
        windows = grad_TW.new_zeros(captions * longest, grad_TW.shape[1]).index_copy_(0, places_T, grad_TW)
        grad_PW = grad_TW.new_zeros(ctx.num_positions, grad_TW.shape[1])
        torch.sum(windows.view(captions, longest, -1), 0, out=grad_PW[:longest])
        return grad_PW, None
