"""The numerical core: one pass over the logits forward, one backward, tile by tile, on one device.

Shapes: B rows (local images), N columns (texts), D features. With s = exp(logit_scale), S = s I T^T, r and c the row
and column log-sum-exp of S and a pair's column p(i), the loss 1/(2B) sum_i [(r_i - S_ip(i)) + (c_p(i) - S_ip(i))] has

    dL/dS_ij = 1/(2B) G_ij,   G_ij = exp(S_ij - r_i) + exp(S_ij - c_j) - 2 [j = p(i)],

so dI = s/(2B) G T, dT = s/(2B) G^T I and dL/dlogit_scale = 1/(2B) sum_ij G_ij S_ij = sum_i <dI_i, I_i>. Forward takes
2BND flops (S), backward 6BND (S again, G T, G^T I). The total of 8BND is the minimum for methods that do not store S.

The terms of G for positive pairs are far larger than all others and nearly cancel. They never enter the products, whose
operands may be half precision: ``add_pairs`` adds their contribution in the accumulator's type.

This module is independent of processes and autograd.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from .products import accumulate
from .statistics import Statistics


class TileOperations(Protocol):
    """What a backend implements: the arithmetic on one tile of logits."""

    rows: int
    """Maximum number of images in a tile."""
    columns: int
    """Maximum number of texts in a tile."""
    gradient_scale: float
    """The factor that ``gradient`` applies to G to keep it within its type's range; a power of two."""

    def operand(self, features: Tensor) -> Tensor:
        """The features in the type that the tiles and the products with G require."""

    def statistics(self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, rows: Statistics, cols: Statistics) -> None:
        """Merge the tile's row and column sums of exponentials into ``rows`` (R) and ``cols`` (C)."""

    def gradient(
        self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor, diagonal: int
    ) -> Tensor:
        """G times ``gradient_scale``, (R, C) in the operands' type, with zeros for the positive pairs: that of row i is
        in column i + diagonal. The result is in the workspace: the next call overwrites it."""


TileFactory = Callable[[Tensor, int], TileOperations]
"""Creates the tile arithmetic for images (b, D) and a maximum number of texts; the result owns its workspace."""


def blocks(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``range(size)``."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def forward_tiles(
    tiles: TileOperations, image_BD: Tensor, text_ND: Tensor, scale: Tensor, rows: Statistics, cols: Statistics
) -> None:
    """Merge the logits of these images and texts into the row (B) and column (N) statistics, in one pass."""
    image_BD, text_ND = tiles.operand(image_BD), tiles.operand(text_ND)
    for r in blocks(len(image_BD), tiles.rows):
        for c in blocks(len(text_ND), tiles.columns):
            tiles.statistics(image_BD[r], text_ND[c], scale, rows[r], cols[c])


def backward_tiles(
    tiles: TileOperations,
    image_BD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    diagonal: int,
    image_grad: Tensor | None,
    text_grad: Tensor | None,
) -> None:
    """Add G T to ``image_grad`` (B, D) and G^T I to ``text_grad`` (N, D), without the positive pairs' terms.

    Both are in the accumulator's type and multiplied by ``tiles.gradient_scale``; ``None`` skips one. Image i is paired
    with text i + diagonal.
    """
    image_BD, text_ND = tiles.operand(image_BD), tiles.operand(text_ND)
    for r in blocks(len(image_BD), tiles.rows):
        for c in blocks(len(text_ND), tiles.columns):
            offset = diagonal + r.start - c.start
            G = tiles.gradient(image_BD[r], text_ND[c], scale, row_lse[r], col_lse[c], offset)
            if image_grad is not None:
                accumulate(G, text_ND[c], image_grad[r])
            if text_grad is not None:
                accumulate(G.t(), image_BD[r], text_grad[c])


# Elements in a temporary: few launches on a GPU, small enough for the cache on a CPU.
_TEMPORARY = {"cuda": 1 << 24, "cpu": 1 << 18}


def paired_dots(left_BD: Tensor, right_BD: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,) dot products of paired rows, computed in ``dtype`` with temporaries of a fixed size."""
    dots = left_BD.new_empty(len(left_BD), dtype=dtype)
    step = max(_TEMPORARY.get(left_BD.device.type, 1 << 24) // left_BD.shape[1], 1)
    for part in blocks(len(left_BD), step):
        torch.sum(left_BD[part].to(dtype) * right_BD[part].to(dtype), dim=1, out=dots[part])
    return dots


def add_pairs(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    image_grad: Tensor | None,
    text_grad: Tensor | None,
    gradient_scale: float,
) -> None:
    """Add the positive pairs' terms, omitted by ``backward_tiles``, to the gradients of paired images and texts."""
    logits = paired_dots(image_BD, text_BD, scale.dtype) * scale
    # p - 1 and q - 1, which are never positive, instead of p + q - 2: exact even when both are nearly 1.
    G = torch.expm1(logits - row_lse).clamp_(max=0) + torch.expm1(logits - col_lse).clamp_(max=0)
    G = G.mul_(gradient_scale)[:, None]
    if image_grad is not None:
        image_grad.addcmul_(text_BD, G)
    if text_grad is not None:
        text_grad.addcmul_(image_BD, G)
