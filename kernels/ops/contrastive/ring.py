"""The ring exchange: texts pass from rank to rank, so no rank ever holds more than two ranks' texts.

Each rank's contribution to another rank's texts (column statistics forward, gradients backward) follows one step behind
the texts, and returns to their owner after a full turn. Both hops of a step overlap with the next tiles.
"""

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from .shared_batch import SharedBatch
from .statistics import Kept
from .tiles import TileFactory, add_pairs, backward_tiles, forward_tiles

_BLOCK, _TOTAL = 1, 2  # tags: what a message carries


def forward(
    make_tiles: TileFactory, image_bD: Tensor, text_bD: Tensor, scale: Tensor, shared: SharedBatch
) -> tuple[Kept, Tensor, Kept, slice]:
    """See :class:`mc2_hpc.kernels.contrastive.function.Exchange`."""
    tiles = make_tiles(image_bD, shared.longest)
    rows = tiles.kept.empty(len(image_bD), device=scale.device, dtype=scale.dtype)

    def visit(owner: int, block: Sequence[Tensor]) -> Tensor:
        cols = tiles.kept_of_columns.empty(shared.batches[owner], device=scale.device, dtype=scale.dtype)
        diagonal = shared.offsets[shared.rank] - shared.offsets[owner]
        forward_tiles(tiles, image_bD, block[0], scale, diagonal, rows, cols)
        return cols.packed()

    def merge(total: Tensor, partial: Tensor) -> None:
        tiles.kept_of_columns.unpacked(total).merge_packed_(partial)

    own_columns = tiles.kept_of_columns.unpacked(circulate(shared, [text_bD.contiguous()], visit, merge))
    return rows, text_bD, own_columns, slice(None)


def backward(
    make_tiles: TileFactory,
    image_bD: Tensor,
    text_bD: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    shared: SharedBatch,
    needs_image: bool,
    needs_text: bool,
) -> tuple[Tensor | None, Tensor | None, float]:
    """(G T (b, D), G^T I of the own texts (b, D), the factor G was scaled by)."""
    tiles = make_tiles(image_bD, shared.longest)
    image_grad = scale.new_zeros((len(image_bD), tiles.width)) if needs_image else None

    def visit(owner: int, block: Sequence[Tensor]) -> Tensor:
        text, lse = block
        text_grad = scale.new_zeros((len(text), tiles.width if needs_text else 0))
        diagonal = shared.offsets[shared.rank] - shared.offsets[owner]
        wanted = text_grad if needs_text else None
        backward_tiles(tiles, image_bD, text, scale, row_lse, lse, diagonal, image_grad, wanted)
        return text_grad

    summed = circulate(shared, [text_bD.contiguous(), col_lse], visit, Tensor.add_)
    text_grad = summed if needs_text else None
    add_pairs(tiles, image_bD, text_bD, scale, row_lse, col_lse, image_grad, text_grad)
    return image_grad, text_grad, tiles.gradient_scale


def circulate(
    shared: SharedBatch,
    block: Sequence[Tensor],
    visit: Callable[[int, Sequence[Tensor]], Tensor],
    merge: Callable[[Tensor, Tensor], object],
) -> Tensor:
    """Pass every rank's block round the ring; returns the merged results of all visits to this rank's block.

    ``visit(owner, block)`` computes a partial result for the block of rank ``owner``; ``merge(total, partial)`` adds it
    to ``total`` in place, with visiting ranks in the order owner, owner + 1, ... The first dimension of every tensor,
    in a block or in a partial result, is the owner's pairs.
    """
    size, rank = shared.size, shared.rank
    arriving: Hop | None = None
    for step in range(size):
        owner, following = (rank - step) % size, (rank - step - 1) % size
        moving = Hop(shared, block, following, _BLOCK) if step < size - 1 else None
        total = visit(owner, block)
        if size == 1:
            return total
        if arriving is not None:
            partial, (total,) = total, arriving.wait()
            merge(total, partial)
        arriving = Hop(shared, [total], following, _TOTAL)
        if moving is not None:
            block = moving.wait()
    assert arriving is not None
    return arriving.wait()[0]


class Hop:
    """Tensors in transit to the next rank in the ring, while the matching tensors owned by ``following`` arrive from
    the previous rank."""

    def __init__(self, shared: SharedBatch, outgoing: Sequence[Tensor], following: int, tag: int) -> None:
        self._outgoing = outgoing  # kept alive until they are sent
        self._incoming = [t.new_empty((shared.batches[following], *t.shape[1:])) for t in outgoing]
        after, before = (shared.rank + 1) % shared.size, (shared.rank - 1) % shared.size
        operations = [_operation(dist.isend, t, after, shared, tag) for t in self._outgoing if t.numel()]
        operations += [_operation(dist.irecv, t, before, shared, tag) for t in self._incoming if t.numel()]
        self._work = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        """The tensors that arrived."""
        for work in self._work:
            work.wait()
        return self._incoming


def _operation(kind: Callable, tensor: Tensor, peer: int, shared: SharedBatch, tag: int) -> dist.P2POp:
    return dist.P2POp(kind, tensor, group=shared.group, tag=tag, group_peer=peer)
