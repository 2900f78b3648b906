"""Names and layouts of a model's weights in three libraries: this one, open_clip and transformers' MetaClip2.

A map is a list of :class:`Entry`: one of our tensors, the peer's tensor or tensors that hold the same numbers, and the
operation between the two layouts. Operations only rearrange numbers, so both directions are bit-exact.

Shape letters in comments: W width, P numbers per patch, E embedding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.presets import ClipArchitecture


class Layout(Protocol):
    """A change of layout and its inverse."""

    def forward(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Our tensor as the peer stores it."""
        ...

    def inverse(self, theirs: Sequence[Tensor]) -> Tensor:
        """The peer's tensors as we store them."""
        ...


@dataclass(frozen=True)
class Same:
    """Stored identically."""

    def forward(self, ours: Tensor) -> tuple[Tensor, ...]:
        return (ours,)

    def inverse(self, theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0]


@dataclass(frozen=True)
class PatchKernel:
    """Our patch matrix (W, P) is the peer's convolution kernel (W, 3, side, side)."""

    side: int

    def forward(self, ours: Tensor) -> tuple[Tensor, ...]:
        return (ours.unflatten(1, (3, self.side, self.side)),)

    def inverse(self, theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0].flatten(1)


@dataclass(frozen=True)
class Transposed:
    """Our projection (W, E) is the weight (E, W) of the peer's linear layer."""

    def forward(self, ours: Tensor) -> tuple[Tensor, ...]:
        return (ours.t().contiguous(),)

    def inverse(self, theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0].t().contiguous()


@dataclass(frozen=True)
class QkvSplit:
    """Our fused queries, keys and values (3W, ...) are three tensors (W, ...) of the peer's."""

    def forward(self, ours: Tensor) -> tuple[Tensor, ...]:
        return ours.chunk(3, dim=0)

    def inverse(self, theirs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(theirs), dim=0)


@dataclass(frozen=True)
class Entry:
    """One of our tensors and where the peer keeps it."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = Same()


def our_shapes(arch: ClipArchitecture) -> dict[str, torch.Size]:
    """Name and shape of every tensor of our model; nothing is allocated."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in CLIP(arch).state_dict().items()}


def peer_shapes(entries: Sequence[Entry], arch: ClipArchitecture) -> dict[str, torch.Size]:
    """Name and shape of every tensor that the peer must have for a model of ``arch``."""
    shapes = our_shapes(arch)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tensor.shape for name, tensor in to_peer(entries, meta.__getitem__)}


def to_peer(entries: Sequence[Entry], get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The peer's named tensors; ours are fetched one at a time with ``get(name)``."""
    for entry in entries:
        yield from zip(entry.theirs, entry.layout.forward(get(entry.ours)), strict=True)


def from_peer(entries: Sequence[Entry], get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our named tensors; the peer's are fetched as needed with ``get(name)``."""
    for entry in entries:
        yield entry.ours, entry.layout.inverse([get(name) for name in entry.theirs])


def open_clip_entries(arch: ClipArchitecture, text_prefix: str = "") -> list[Entry]:
    """The map to open_clip's ``CLIP`` or, with ``text_prefix="text."``, its ``CustomTextCLIP``."""
    entries = [
        Entry("vision.patch_embedding.weight", ("visual.conv1.weight",), PatchKernel(arch.vision.patch_size)),
        Entry("vision.class_embedding", ("visual.class_embedding",)),
        Entry("vision.positional_embedding", ("visual.positional_embedding",)),
        Entry("vision.projection", ("visual.proj",)),
        Entry("text.token_embedding.weight", (f"{text_prefix}token_embedding.weight",)),
        Entry("text.positional_embedding", (f"{text_prefix}positional_embedding",)),
        Entry("text.projection", (f"{text_prefix}text_projection",)),
        Entry("logit_scale", ("logit_scale",)),
        *([Entry("logit_bias", ("logit_bias",))] if arch.logit_bias else []),
    ]
    norms = {
        "vision.norm_pre": "visual.ln_pre",
        "vision.norm_post": "visual.ln_post",
        "text.norm_final": f"{text_prefix}ln_final",
    }
    for ours, theirs in norms.items():
        entries += _weight_and_bias(ours, theirs)
    towers = {
        "vision": ("visual.transformer", arch.vision.layers),
        "text": (f"{text_prefix}transformer", arch.text.layers),
    }
    for ours, (theirs, layers) in towers.items():
        for index in range(layers):
            entries += _open_clip_block(f"{ours}.transformer.blocks.{index}", f"{theirs}.resblocks.{index}")
    return entries


def huggingface_entries(arch: ClipArchitecture) -> list[Entry]:
    """The map to transformers' ``MetaClip2Model``."""
    vision, text = "vision_model", "text_model"
    entries = [
        Entry(
            "vision.patch_embedding.weight",
            (f"{vision}.embeddings.patch_embedding.weight",),
            PatchKernel(arch.vision.patch_size),
        ),
        Entry("vision.class_embedding", (f"{vision}.embeddings.class_embedding",)),
        Entry("vision.positional_embedding", (f"{vision}.embeddings.position_embedding.weight",)),
        Entry("vision.projection", ("visual_projection.weight",), Transposed()),
        Entry("text.token_embedding.weight", (f"{text}.embeddings.token_embedding.weight",)),
        Entry("text.positional_embedding", (f"{text}.embeddings.position_embedding.weight",)),
        Entry("text.projection", ("text_projection.weight",), Transposed()),
        Entry("logit_scale", ("logit_scale",)),
    ]
    norms = {
        "vision.norm_pre": f"{vision}.pre_layrnorm",  # sic
        "vision.norm_post": f"{vision}.post_layernorm",
        "text.norm_final": f"{text}.final_layer_norm",
    }
    for ours, theirs in norms.items():
        entries += _weight_and_bias(ours, theirs)
    towers = {"vision": (vision, arch.vision.layers), "text": (text, arch.text.layers)}
    for ours, (theirs, layers) in towers.items():
        for index in range(layers):
            entries += _huggingface_block(f"{ours}.transformer.blocks.{index}", f"{theirs}.encoder.layers.{index}")
    return entries


def _weight_and_bias(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]


def _block(ours: str, theirs: str, names: Mapping[str, str]) -> list[Entry]:
    return [entry for a, b in names.items() for entry in _weight_and_bias(f"{ours}.{a}", f"{theirs}.{b}")]


def _open_clip_block(ours: str, theirs: str) -> list[Entry]:
    names = {
        "norm_1": "ln_1",
        "attention.out": "attn.out_proj",
        "norm_2": "ln_2",
        "fc": "mlp.c_fc",
        "proj": "mlp.c_proj",
    }
    qkv = [Entry(f"{ours}.attention.qkv.{kind}", (f"{theirs}.attn.in_proj_{kind}",)) for kind in ("weight", "bias")]
    return qkv + _block(ours, theirs, names)


def _huggingface_block(ours: str, theirs: str) -> list[Entry]:
    names = {
        "norm_1": "layer_norm1",
        "attention.out": "self_attn.out_proj",
        "norm_2": "layer_norm2",
        "fc": "mlp.fc1",
        "proj": "mlp.fc2",
    }
    qkv = [
        Entry(
            f"{ours}.attention.qkv.{kind}",
            tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"),
            QkvSplit(),
        )
        for kind in ("weight", "bias")
    ]
    return qkv + _block(ours, theirs, names)
