"""The image tower: a pre-norm vision transformer with a class token.

Shape suffixes: B batch, C colour channels, S image side, N patches, K kept patches, P numbers per patch, W width, E
embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc2_hpc.models.fused import LayerNorm
from mc2_hpc.models.layers import Transformer
from mc2_hpc.models.presets import VisionArchitecture


class VisionTower(nn.Module):
    """Images to embeddings, not normalised."""

    def __init__(self, arch: VisionArchitecture, embed_dim: int, *, quick_gelu: bool) -> None:
        super().__init__()
        self.arch = arch
        # A convolution whose stride equals its kernel size is a matrix product over patches.
        self.patch_embedding = nn.Linear(3 * arch.patch_size**2, arch.width, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(arch.width))
        self.positional_embedding = nn.Parameter(torch.empty(arch.num_patches + 1, arch.width))
        self.norm_pre = LayerNorm(arch.width)
        self.transformer = Transformer(
            arch.width,
            arch.layers,
            arch.width // arch.head_width,
            arch.mlp_width,
            causal=False,
            quick_gelu=quick_gelu,
        )
        self.norm_post = LayerNorm(arch.width)
        self.projection = nn.Parameter(torch.empty(arch.width, embed_dim))

    def forward(self, images_BCSS: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) normalised images to (B, E); S is ``arch.image_size``.

        Args:
            kept_BK: int64, the patches of each image that are computed, counted row by row; ``None`` is all of them.
        """
        patches_BNP = self._patchify(images_BCSS)
        positions: Tensor = self.positional_embedding
        if kept_BK is not None:
            patches_BNP = patches_BNP.gather(1, kept_BK[..., None].expand(-1, -1, patches_BNP.shape[2]))
            first_B11 = kept_BK.new_zeros(len(kept_BK), 1)  # the class token has the first position
            positions = F.embedding(torch.cat([first_B11, kept_BK + 1], dim=1), positions)
        x_BNW = self.patch_embedding(patches_BNP)
        class_B1W = self.class_embedding.to(x_BNW.dtype).expand(x_BNW.shape[0], 1, -1)
        x_BNW = torch.cat([class_B1W, x_BNW], dim=1) + positions.to(x_BNW.dtype)
        num_images, length = x_BNW.shape[:2]
        class_rows_B = torch.arange(0, num_images * length, length, device=x_BNW.device)
        pooled_BW = self.transformer(self.norm_pre(x_BNW), pooled_B=class_rows_B)
        return self.norm_post(pooled_BW) @ self.projection

    def _patchify(self, images_BCSS: Tensor) -> Tensor:
        grid, side = self.arch.grid, self.arch.patch_size
        if images_BCSS.shape[1:] != (3, self.arch.image_size, self.arch.image_size):
            raise ValueError(
                f"images of shape {tuple(images_BCSS.shape)}: this model takes "
                f"(batch, 3, {self.arch.image_size}, {self.arch.image_size})"
            )
        patches = images_BCSS.unflatten(2, (grid, side)).unflatten(4, (grid, side))  # B C gy py gx px
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(images_BCSS.shape[0], grid * grid, 3 * side * side)

    @torch.no_grad()
    def init_parameters(self) -> None:
        """open_clip's initialisation: PyTorch's layer defaults, embeddings and projection at width^-0.5."""
        fan_in = self.patch_embedding.in_features
        nn.init.uniform_(self.patch_embedding.weight, -(fan_in**-0.5), fan_in**-0.5)
        for parameter in (self.class_embedding, self.positional_embedding, self.projection):
            nn.init.normal_(parameter, std=self.arch.width**-0.5)
        for norm in (self.norm_pre, self.norm_post):
            norm.reset_parameters()
        for block in self.transformer.blocks:
            block.norm_1.reset_parameters()
            block.norm_2.reset_parameters()
            # nn.MultiheadAttention's defaults: Xavier over the fused matrix, zero biases.
            nn.init.xavier_uniform_(block.attention.qkv.weight)
            nn.init.zeros_(block.attention.qkv.bias)
            nn.init.kaiming_uniform_(block.attention.out.weight, a=math.sqrt(5))
            nn.init.zeros_(block.attention.out.bias)
            block.fc.reset_parameters()
            block.proj.reset_parameters()
