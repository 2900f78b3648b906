"""The all-gather exchange: every rank gathers all texts and computes its images against them.

The first tiles, for a rank's own texts, are computed while the others are still in transit. Memory: the texts of all
ranks, and in backward their fp32 gradients until they are sent to their owners.
"""

from torch import Tensor

from .shared_batch import SharedBatch
from .statistics import Kept
from .tiles import TileFactory, add_pairs, backward_tiles, forward_tiles


def forward(
    make_tiles: TileFactory, image_bD: Tensor, text_bD: Tensor, scale: Tensor, shared: SharedBatch
) -> tuple[Kept, Tensor, Kept, slice]:
    """See :class:`mc2_hpc.kernels.contrastive.function.Exchange`."""
    num_columns, own = shared.global_batch, shared.part(shared.rank)
    tiles = make_tiles(image_bD, num_columns)
    rows = tiles.kept.empty(len(image_bD), device=scale.device, dtype=scale.dtype)
    cols = tiles.kept_of_columns.empty(num_columns, device=scale.device, dtype=scale.dtype)
    if shared.size == 1:
        forward_tiles(tiles, image_bD, text_bD, scale, 0, rows, cols)
        return rows, text_bD, cols, own

    gathering = shared.gather(text_bD)
    forward_tiles(tiles, image_bD, text_bD, scale, 0, rows, cols[own])
    text_ND = gathering.wait()
    for others in (slice(0, own.start), slice(own.stop, num_columns)):
        diagonal = own.start - others.start
        forward_tiles(tiles, image_bD, text_ND[others], scale, diagonal, rows, cols[others])
    return rows, text_ND, cols.over_ranks(shared), own


def backward(
    make_tiles: TileFactory,
    image_bD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    shared: SharedBatch,
    needs_image: bool,
    needs_text: bool,
) -> tuple[Tensor | None, Tensor | None, float]:
    """(G T (b, D), G^T I of the own texts (b, D), the factor G was scaled by)."""
    tiles = make_tiles(image_bD, shared.global_batch)
    image_grad = scale.new_zeros((len(image_bD), tiles.width)) if needs_image else None
    text_grad = scale.new_zeros((shared.global_batch, tiles.width)) if needs_text else None
    diagonal = shared.offsets[shared.rank]
    backward_tiles(tiles, image_bD, text_ND, scale, row_lse, col_lse, diagonal, image_grad, text_grad)
    if text_grad is not None and shared.size > 1:
        text_grad = shared.sum_to_owners(text_grad)
    own = shared.part(shared.rank)
    add_pairs(tiles, image_bD, text_ND[own], scale, row_lse, col_lse[own], image_grad, text_grad)
    return image_grad, text_grad, tiles.gradient_scale
