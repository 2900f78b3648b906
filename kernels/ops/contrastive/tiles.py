"""The numerical core: one pass over the logits forward, one backward, tile by tile, on one device.

Shapes: B rows (local images), N columns (texts), D features. With s = exp(logit_scale), S = s I T^T, r and c the row
and column log-sum-exp of S and a pair's column p(i), the loss 1/(2B) sum_i [(r_i - S_ip(i)) + (c_p(i) - S_ip(i))] has

    dL/dS_ij = 1/(2B) G_ij,   G_ij = exp(S_ij - r_i) + exp(S_ij - c_j) - 2 [j = p(i)],

so dI = s/(2B) G T, dT = s/(2B) G^T I and dL/dlogit_scale = 1/(2B) sum_ij G_ij S_ij = sum_i <dI_i, I_i>. Forward takes
2BND flops (S), backward 6BND (S again, G T, G^T I). The total of 8BND is the minimum for methods that do not store S.

The terms of G for positive pairs are far larger than all others and nearly cancel. They never enter the products, whose
operands may be half precision: ``add_pairs`` adds their contribution in the accumulator's type.

With a teacher, whose logits of the same pairs are U, the loss is L + w K, where K is the mean over rows and columns of
KL(softmax U || softmax S). With a and a' the row and column log-sum-exp of U and v = w / (1 + w),

    G_ij = exp(S_ij - r_i) + exp(S_ij - c_j) - v [exp(U_ij - a_i) + exp(U_ij - a'_j)] - 2 (1 - v) [j = p(i)]

and all gradients are 1 + w times those above. Rows of images and texts then hold both models' features, the student's
first, so that exchanges and tiles are the same; log-sum-exp are (n, 2), the student's first.

The sigmoid loss (SigLIP, Zhai et al. 2023, arXiv 2303.15343) with S = s I T^T + b is the mean over the B images of
sum_j softplus(S_ij) over the texts that are not theirs, plus softplus(-S_ip(i)). So

    dL/dS_ij = 1/B G_ij,   G_ij = sigmoid(S_ij) - [j = p(i)],

dI and dT as above with twice the factor, and dL/db = 1/B sum_ij G_ij. Nothing is kept of columns, and of rows only the
sums of softplus and of the sigmoid.

This module is independent of processes and autograd.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .products import accumulate
from .statistics import Kept
from .teacher import Distillation


class TileOperations(Protocol):
    """What a backend implements: the arithmetic on one tile of logits."""

    rows: int
    """Maximum number of images in a tile."""
    columns: int
    """Maximum number of texts in a tile."""
    gradient_scale: float
    """The factor that ``gradient`` applies to G to keep it within its type's range; a power of two."""
    width: int
    """Of the features that get gradients."""
    distillation: Distillation | None
    """How a teacher's features enter, if the rows have them."""
    bias: Tensor | None
    """0-d, of the sigmoid loss; ``None`` for the softmax."""

    @property
    def kept(self) -> type[Kept]:
        """What ``statistics`` merges into, of rows."""

    @property
    def kept_of_columns(self) -> type[Kept]:
        """The same, of columns."""

    def operand(self, features: Tensor) -> Tensor:
        """The features in the type that the tiles and the products with G require."""

    def statistics(self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, diagonal: int, rows: Any, cols: Any) -> None:
        """Merge the tile's logits into ``rows`` (R) and ``cols`` (C), which are of the types above. The positive pair
        of row i, which the sigmoid loss leaves out, is in column i + diagonal."""

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
    tiles: TileOperations, image_BD: Tensor, text_ND: Tensor, scale: Tensor, diagonal: int, rows: Kept, cols: Kept
) -> None:
    """Merge the logits of these images and texts into the row (B) and column (N) statistics, in one pass.

    Image i is paired with text i + diagonal.
    """
    image_BD, text_ND = tiles.operand(image_BD), tiles.operand(text_ND)
    for r in blocks(len(image_BD), tiles.rows):
        for c in blocks(len(text_ND), tiles.columns):
            tiles.statistics(image_BD[r], text_ND[c], scale, diagonal + r.start - c.start, rows[r], cols[c])


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

    Images and texts are (B, D) and (N, D), or wider with a teacher. Both gradients are in the accumulator's type and
    multiplied by ``tiles.gradient_scale``; ``None`` skips one. Image i is paired with text i + diagonal.
    """
    image_BD, text_ND = tiles.operand(image_BD), tiles.operand(text_ND)
    trained_image, trained_text = image_BD[:, : tiles.width], text_ND[:, : tiles.width]
    for r in blocks(len(image_BD), tiles.rows):
        for c in blocks(len(text_ND), tiles.columns):
            offset = diagonal + r.start - c.start
            G = tiles.gradient(image_BD[r], text_ND[c], scale, row_lse[r], col_lse[c], offset)
            if image_grad is not None:
                accumulate(G, trained_text[c], image_grad[r])
            if text_grad is not None:
                accumulate(G.t(), trained_image[r], text_grad[c])


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
    tiles: TileOperations,
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    image_grad: Tensor | None,
    text_grad: Tensor | None,
) -> None:
    """Add the positive pairs' terms, omitted by ``backward_tiles``, to the gradients of paired images and texts."""
    distillation = tiles.distillation
    if tiles.bias is not None:
        # sigmoid(S) - 1 = -sigmoid(-S), exact even when sigmoid(S) is nearly 1.
        logits = paired_dots(image_BD, text_BD, scale.dtype) * scale + tiles.bias
        G = logits.neg_().sigmoid_().neg_()
    elif distillation is None:
        G = _paired_excess(image_BD, text_BD, scale, row_lse, col_lse)
    else:
        (image_BD, teacher_image), (text_BD, teacher_text) = map(distillation.parts, (image_BD, text_BD))
        G = _paired_excess(image_BD, text_BD, scale, row_lse[:, 0], col_lse[:, 0])
        excess = _paired_excess(teacher_image, teacher_text, distillation.scale, row_lse[:, 1], col_lse[:, 1])
        # p - (1 - v) - v q = (p - 1) - v (q - 1)
        G.sub_(excess, alpha=distillation.share)
    G = G.mul_(tiles.gradient_scale)[:, None]
    if image_grad is not None:
        image_grad.addcmul_(text_BD, G)
    if text_grad is not None:
        text_grad.addcmul_(image_BD, G)


def _paired_excess(
    image_BD: Tensor, text_BD: Tensor, scale: Tensor | float, row_lse: Tensor, col_lse: Tensor
) -> Tensor:
    """(B,) p + q - 2 of the positive pairs' probabilities p in their rows and q in their columns."""
    logits = paired_dots(image_BD, text_BD, row_lse.dtype) * scale
    # p - 1 and q - 1, which are never positive, instead of p + q - 2: exact even when both are nearly 1.
    return torch.expm1(logits - row_lse).clamp_(max=0) + torch.expm1(logits - col_lse).clamp_(max=0)
