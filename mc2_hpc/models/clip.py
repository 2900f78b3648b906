"""The dual encoder."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc2_hpc.config import ModelConfig
from mc2_hpc.models.fused import LayerNorm, QuickGELU, resolve_activation, resolve_norm
from mc2_hpc.models.layers import Recompute, Transformer, resolve_attention
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.models.text import TextTower
from mc2_hpc.models.vision import VisionTower

LOGIT_SCALE_INIT = math.log(1 / 0.07)
SIGMOID_SCALE_INIT, SIGMOID_BIAS_INIT = math.log(10), -10.0
"""Where logits have a bias: SigLIP's (arXiv 2303.15343, section 3.2)."""


class Towers(nn.Module):
    """An image tower and a text tower with a shared embedding space."""

    def __init__(self, vision: VisionTower, text: TextTower) -> None:
        super().__init__()
        self.vision = vision
        self.text = text

    def encode_image(self, images: Tensor, normalize: bool = False, *, kept: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) normalised images to (B, E) embeddings; unit-length and fp32 if ``normalize``.

        Args:
            kept: (B, K) int64, the patches that are computed (see :class:`VisionTower`).
        """
        features = self.vision(images, kept)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False, *, lengths: Sequence[int] | None = None) -> Tensor:
        """(B, L) token ids to (B, E) embeddings; unit-length and fp32 if ``normalize``.

        Args:
            lengths: of the captions, which are then computed without their padding (see :class:`TextTower`).
        """
        features = self.text(tokens, lengths)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_pairs(
        self, images: Tensor, tokens: Tensor, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit-length embeddings of images and of their captions, each (B, E) in fp32."""
        return self.encode_image(images, True), self.encode_text(tokens, True, lengths=lengths)


class CLIP(Towers):
    """Both towers, the learnt temperature ``logit_scale`` (its logarithm, as in OpenAI's CLIP), and ``logit_bias`` if
    the architecture has one.

    Built under ``torch.device("meta")`` it uses no memory: load weights with ``load_state_dict(assign=True)``. It has
    no buffers that would remain on meta.
    """

    def __init__(self, arch: ClipArchitecture) -> None:
        super().__init__(
            VisionTower(arch.vision, arch.embed_dim, quick_gelu=arch.quick_gelu),
            TextTower(arch.text, arch.embed_dim, quick_gelu=arch.quick_gelu),
        )
        self.arch = arch
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = nn.Parameter(torch.empty(())) if arch.logit_bias else None
        """Added to every logit; ``None`` for models of the softmax loss, where it would have no effect."""

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-length image and text embeddings (B, E) in fp32, and ``logit_scale`` (0-d, fp32)."""
        return *self.encode_pairs(images, tokens), self.logit_scale.float()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """Initialise every parameter from torch's global RNG, as open_clip does."""
        self.vision.init_parameters()
        self.text.init_parameters()
        self.logit_scale.fill_(LOGIT_SCALE_INIT)
        if self.logit_bias is not None:
            self.logit_scale.fill_(SIGMOID_SCALE_INIT)
            self.logit_bias.fill_(SIGMOID_BIAS_INIT)

    def transformers(self) -> list[Transformer]:
        """The block stacks of both towers."""
        return [self.vision.transformer, self.text.transformer]

    def set_attention(self, name: str, device_type: str) -> None:
        """Compute attention with the backend ``name`` (see :func:`mc2_hpc.models.layers.resolve_attention`)."""
        backend = resolve_attention(name, device_type)
        for transformer in self.transformers():
            for block in transformer.blocks:
                block.attention.backend = backend

    def set_norm(self, name: str, device_type: str, *, compiled: bool = False) -> None:
        """Compute every layer norm with the backend ``name`` (see :func:`mc2_hpc.models.fused.resolve_norm`)."""
        backend = resolve_norm(name, device_type, compiled=compiled)
        for layer in self.modules():
            if isinstance(layer, LayerNorm):
                layer.backend = backend

    def set_activation(self, name: str, device_type: str, *, compiled: bool = False) -> None:
        """Compute quick-GELU with the backend ``name``; a model with GELU stays as it is."""
        layers = [layer for layer in self.modules() if isinstance(layer, QuickGELU)]
        if layers:
            backend = resolve_activation(name, device_type, compiled=compiled)
            for layer in layers:
                layer.backend = backend

    def set_recompute(self, name: str) -> None:
        """Compute as much of every block again in the backward pass as :class:`Recompute` says of ``name``.

        Raises:
            ValueError: the name is unknown.
        """
        for transformer in self.transformers():
            transformer.recompute = Recompute(name)

    def set_backends(self, config: ModelConfig, device_type: str) -> None:
        """Compute as a run's config says: attention, layer norms, activation and what is recomputed."""
        self.set_attention(config.attention, device_type)
        self.set_norm(config.norm, device_type, compiled=config.compile)
        self.set_activation(config.activation, device_type, compiled=config.compile)
        self.set_recompute(config.recompute)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """torch.compile every block in place: identical blocks share one compilation, and names do not change.

        Args:
            backend: as for ``torch.compile``.
        """
        # Towers, their last blocks, passes without gradients and sizes that change have graphs of their own: more than
        # the eight after which PyTorch would no longer compile.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for transformer in self.transformers():
            for block in transformer.blocks:
                block.compile(backend=backend)


def build_clip(arch: ClipArchitecture, *, seed: int) -> CLIP:
    """A CLIP on the CPU whose weights depend only on ``seed``; torch's global RNG state is left unchanged."""
    with torch.device("meta"):
        model = CLIP(arch)
    model = model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.init_parameters()
    return model


def flops_per_pair(
    arch: ClipArchitecture,
    text_length: int,
    frozen: Mapping[str, int] | None = None,
    *,
    num_patches: int | None = None,
    ranks: Mapping[str, int] | None = None,
) -> int:
    """Floating-point operations of a forward and backward pass over one image-text pair: 3 x the forward's, or 1 x for
    what is frozen.

    Counts the matrix products of the blocks (2 flops per multiply-add: 3 W^2 for queries, keys and values, W^2 for the
    projection after them, 2 W M for the MLP, and 2 L W for scores and values, causal or not), the patch embedding and
    the projections; the token look-up is free. The last block's projection and MLP are of one row. The products with
    the weights of an adapted tower count 2 x: no gradient of the weights is computed, nor, in the first block's
    projection, of its input.

    Args:
        text_length: tokens computed per caption.
        frozen: greatest frozen depth (:mod:`mc2_hpc.models.depth`) of ``vision`` and ``text``; below 0 for none.
        num_patches: computed per image; None is all of them, 0 does not encode images.
        ranks: of the adapters (:mod:`mc2_hpc.models.lora`) of ``vision`` and ``text``, if it is adapted.
    """
    vision, text = arch.vision, arch.text
    if num_patches is None:
        num_patches = vision.num_patches

    def tower(name: str, length: int, width: int, mlp_width: int, layers: int, embedding: int) -> int:
        rows = (layers - 1) * length + 1  # of all blocks, after the attention
        attention = 4 * length**2 * width
        if rank := (ranks or {}).get(name):
            products = 2 * (layers * length * 3 * width**2 + rows * (width**2 + 2 * width * mlp_width))
            adapters = 2 * rank * (layers * length * 4 * width + rows * 2 * (2 * width + mlp_width))
            whole = 2 * products + 3 * (layers * attention + adapters)
            return embedding + whole - 2 * length * (3 * width**2 + rank * width) + 2 * 2 * width * arch.embed_dim
        deepest = -1 if frozen is None else frozen[name]
        in_all, in_pooled = 2 * length * 3 * width**2 + attention, 2 * (width**2 + 2 * width * mlp_width)
        blocks = [*[in_all + length * in_pooled] * (layers - 1), in_all + in_pooled]
        forward = [embedding, *blocks, 2 * width * arch.embed_dim]
        return sum(flops * (3 if depth > deepest else 1) for depth, flops in enumerate(forward))

    patches = 2 * num_patches * 3 * vision.patch_size**2 * vision.width
    flops = tower("text", text_length, text.width, 4 * text.width, text.layers, 0)
    if num_patches:
        flops += tower("vision", num_patches + 1, vision.width, vision.mlp_width, vision.layers, patches)
    return flops
