"""Causal attention within each of several captions that lie one after another.

Shape suffixes: B captions, L longest caption, T tokens of all captions, H heads, D channels per head.
"""

from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mc2_hpc.models.packed_captions import Packing
from mc2_hpc.models.rows import take_rows

_HALVES = (torch.float16, torch.bfloat16)


class AttentionFunction(Protocol):
    """Softmax attention of (B, H, L, D) queries, keys and values; scale D^-0.5."""

    def __call__(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, *, causal: bool) -> Tensor: ...


class PackedAttentionFunction(Protocol):
    """Causal softmax attention within each caption, of (T, 3, H, D) queries, keys and values, to (T, H, D)."""

    def __call__(self, qkv_T3HD: Tensor, packing: Packing) -> Tensor: ...


class _Spread(torch.autograd.Function):
    """Packed rows (T, W) to one window per caption, (B * L, W).

    The rows of a window beyond its caption affect no result that is kept, so their gradient is zero and a packed row
    has the gradient of its own place. Autograd, which does not know this, would add up rows of all windows.
    """

    @staticmethod
    def forward(ctx: Any, rows_TW: Tensor, windows: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(places_T)
        return rows_TW.index_select(0, windows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places_T,) = ctx.saved_tensors
        return gradients[0].index_select(0, places_T), None, None


def packed_by(attend: AttentionFunction) -> PackedAttentionFunction:
    """Packed attention by a function for rows of equal length: one call for all captions, whatever their lengths.

    Attention takes a few percent of the text tower's time at the lengths of captions, so its padding costs little. One
    call per length would compute no padding, but on a CPU dozens of small calls per layer take longer than one.
    """

    def attend_packed(qkv_T3HD: Tensor, packing: Packing) -> Tensor:
        rows = _Spread.apply(qkv_T3HD.flatten(1), packing.windows_BL.flatten(), packing.places_T)
        qkv_BL3HD = rows.view(*packing.windows_BL.shape, *qkv_T3HD.shape[1:])
        q_BHLD, k_BHLD, v_BHLD = qkv_BL3HD.permute(2, 0, 3, 1, 4).unbind(0)
        y_BLHD = attend(q_BHLD, k_BHLD, v_BHLD, causal=True).transpose(1, 2)
        y_THC = take_rows(y_BLHD.flatten(2), packing.places_T)
        return y_THC.view(-1, *qkv_T3HD.shape[2:])

    return attend_packed


def torch_varlen(fallback: PackedAttentionFunction) -> PackedAttentionFunction:
    """torch's variable-length flash attention, for CUDA devices; ``fallback`` where its kernel cannot run.

    The kernel takes half types, and heads of up to 256 channels in multiples of 8.
    """
    from torch.nn.attention.varlen import varlen_attn

    def attend_packed(qkv_T3HD: Tensor, packing: Packing) -> Tensor:
        width = qkv_T3HD.shape[-1]
        if qkv_T3HD.dtype not in _HALVES or width % 8 or width > 256:
            return fallback(qkv_T3HD, packing)
        q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
        longest = packing.windows_BL.shape[1]
        # A window that ends at the query's own position is causal attention.
        y_THD = varlen_attn(q_THD, k_THD, v_THD, packing.starts, packing.starts, longest, longest, window_size=(-1, 0))
        return cast(Tensor, y_THD)  # a tuple only if auxiliary outputs are requested

    return attend_packed


def xformers_block_diagonal() -> PackedAttentionFunction:
    """xformers' memory-efficient attention under its ``BlockDiagonalCausalMask``.

    Raises:
        ImportError: xformers does not load.
    """
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    @lru_cache(maxsize=1)  # all layers of a forward pass, and of its recomputation, share a mask
    def mask_of(packing: Packing) -> Any:
        return BlockDiagonalCausalMask.from_seqlens(list(packing.lengths), device=packing.starts.device)

    # The mask keeps its lengths as Python integers, which compiled code would depend on.
    @torch.compiler.disable
    def attend_packed(qkv_T3HD: Tensor, packing: Packing) -> Tensor:
        q_1THD, k_1THD, v_1THD = qkv_T3HD[None].unbind(2)
        return memory_efficient_attention(q_1THD, k_1THD, v_1THD, attn_bias=mask_of(packing))[0]

    return attend_packed
