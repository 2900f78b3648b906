"""The text tower: a causal transformer whose embedding is taken at the first EOS token.

Shape suffixes: B batch, L sequence, T tokens of packed captions, W width, E embedding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mc2_hpc.models.fused import LayerNorm
from mc2_hpc.models.layers import Transformer
from mc2_hpc.models.packed_captions import PositionRows, pack, packing_pays
from mc2_hpc.models.presets import TextArchitecture


class TextTower(nn.Module):
    """Token rows to embeddings, not normalised.

    Under the causal mask, tokens after the EOS do not affect it, so rows may be cut anywhere after their EOS: a batch
    padded to its longest caption gives the same embeddings as one padded to ``context_length``.
    """

    def __init__(self, arch: TextArchitecture, embed_dim: int, *, quick_gelu: bool) -> None:
        super().__init__()
        self.arch = arch
        self.token_embedding = nn.Embedding(arch.vocab_size, arch.width)
        self.positional_embedding = nn.Parameter(torch.empty(arch.context_length, arch.width))
        self.transformer = Transformer(
            arch.width, arch.layers, arch.heads, 4 * arch.width, causal=True, quick_gelu=quick_gelu
        )
        self.norm_final = LayerNorm(arch.width)
        self.projection = nn.Parameter(torch.empty(arch.width, embed_dim))

    def forward(self, tokens_BL: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """(B, L) token ids, L <= ``context_length``, an EOS in every row, to (B, E).

        Args:
            lengths: tokens of each row up to its first EOS (:func:`mc2_hpc.models.packed_captions.caption_lengths`).
                With these only the captions' own tokens are computed, unless there is hardly any padding; without them,
                whole rows. The embeddings are equal up to rounding.
        """
        if tokens_BL.shape[1] > self.arch.context_length:
            raise ValueError(f"{tokens_BL.shape[1]} tokens per row: this model takes {self.arch.context_length}")
        if lengths is not None and len(lengths) != tokens_BL.shape[0]:
            raise ValueError(f"{len(lengths)} lengths of {tokens_BL.shape[0]} captions")
        if lengths is not None and packing_pays(lengths, tokens_BL.shape[1]):
            pooled_BW = self._packed(tokens_BL, lengths)
        else:
            pooled_BW = self._padded(tokens_BL)
        return self.norm_final(pooled_BW) @ self.projection

    def _padded(self, tokens_BL: Tensor) -> Tensor:
        x_BLW = self.token_embedding(tokens_BL) + self.positional_embedding[: tokens_BL.shape[1]]
        # argmax of a boolean row is its first True.
        eos_B = (tokens_BL == self.arch.eos_id).int().argmax(dim=1)
        eos_B = eos_B + tokens_BL.shape[1] * torch.arange(tokens_BL.shape[0], device=eos_B.device)
        return self.transformer(_residual(x_BLW), pooled_B=eos_B)

    def _packed(self, tokens_BL: Tensor, lengths: Sequence[int]) -> Tensor:
        packing = pack(lengths, tokens_BL.shape[1], tokens_BL.device)
        tokens_T = tokens_BL.flatten().index_select(0, packing.sources_T)
        x_TW = self.token_embedding(tokens_T) + PositionRows.apply(self.positional_embedding, packing)
        return self.transformer(_residual(x_TW), packing, pooled_B=packing.last_B)

    @torch.no_grad()
    def init_parameters(self) -> None:
        """open_clip's initialisation of the text tower."""
        width, layers = self.arch.width, self.arch.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.projection, std=width**-0.5)
        self.norm_final.reset_parameters()
        for block in self.transformer.blocks:
            block.norm_1.reset_parameters()
            block.norm_2.reset_parameters()
            nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
            nn.init.zeros_(block.attention.qkv.bias)
            nn.init.normal_(block.attention.out.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.zeros_(block.attention.out.bias)
            nn.init.normal_(block.fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            # open_clip keeps nn.Linear's default bias.
            for linear in (block.fc, block.proj):
                bound = 1 / math.sqrt(linear.in_features)
                nn.init.uniform_(linear.bias, -bound, bound)


def _residual(x: Tensor) -> Tensor:
    """The input of the blocks: as in the image tower, the residual stream has the autocast dtype."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
