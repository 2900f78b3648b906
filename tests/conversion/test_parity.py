"""Same weights, same logits: against open_clip and transformers, at every size of the family."""

import dataclasses
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from mc2_hpc.conversion import huggingface
from mc2_hpc.conversion import open_clip as to_open_clip
from mc2_hpc.conversion.keys import huggingface_entries, open_clip_entries, peer_shapes, to_peer
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.models.presets import PRESETS, ClipArchitecture
from mc2_hpc.models.weights import ModelCard

TOLERANCE = 1e-5

# Our and open_clip's names of the same architectures.
NAMED_IN_OPEN_CLIP = {
    "ViT-H-14-worldwide-quickgelu": "ViT-H-14-worldwide-quickgelu",
    "ViT-H-14-worldwide": "ViT-H-14-worldwide",
    "ViT-H-14-worldwide-378": "ViT-H-14-worldwide-378",
    "ViT-bigG-14-worldwide": "ViT-bigG-14-worldwide",
    "ViT-bigG-14-worldwide-378": "ViT-bigG-14-worldwide-378",
    "ViT-L-14-worldwide-mt5": "ViT-L-14-worldwide",
}

# Layers to keep in each tower; one preset of each size, including larger images.
CUT = {
    "ViT-S-16-worldwide-384": 2,
    "ViT-M-16-worldwide": 2,
    "ViT-B-32-worldwide-384": 2,
    "ViT-B-16-worldwide": 2,
    "ViT-L-14-worldwide-mt5": 2,
    "ViT-H-14-worldwide-quickgelu": 2,
    "ViT-H-14-worldwide-378": 1,
    "ViT-bigG-14-worldwide": 1,
}


def card(preset: str) -> ModelCard:
    return ModelCard(arch=PRESETS[preset], tokenizer_style="mt5" if "mt5" in preset else "xlmv")


def open_clip_twin(open_clip: ModuleType, model: CLIP) -> torch.nn.Module:
    config = to_open_clip.config(ModelCard(arch=model.arch, tokenizer_style="xlmv"))["model_cfg"]
    with torch.device("meta"):
        twin = open_clip.CLIP(**config)
    twin.load_state_dict(dict(to_peer(open_clip_entries(model.arch), model.state_dict().__getitem__)), assign=True)
    twin.attn_mask = torch.full((model.arch.text.context_length,) * 2, float("-inf")).triu_(1)  # a buffer, on meta
    return twin.eval()


def transformers_twin(transformers: ModuleType, model: CLIP) -> torch.nn.Module:
    config = huggingface.config(ModelCard(arch=model.arch, tokenizer_style="xlmv"))
    with torch.device("meta"):
        twin = transformers.MetaClip2Model(transformers.MetaClip2Config(**config))
    state = dict(to_peer(huggingface_entries(model.arch), model.state_dict().__getitem__))
    twin.load_state_dict(state, assign=True)
    for tower in (twin.vision_model, twin.text_model):  # buffers, on meta
        tower.embeddings.position_ids = torch.arange(tower.embeddings.position_ids.shape[1])[None]
    return twin.eval()


def batch(model: CLIP) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images and four captions: padded, full length, two EOS (the first counts), and only EOS."""
    generator = torch.Generator().manual_seed(5)
    text = model.arch.text
    tokens = torch.randint(4, text.vocab_size, (4, text.context_length), generator=generator)
    eos = [9, text.context_length - 1, 3, 0]
    for row, end in enumerate(eos):
        tokens[row, end] = text.eos_id
        tokens[row, end + 1 :] = 1
    tokens[2, 7] = text.eos_id
    images = torch.randn(2, 3, model.arch.vision.image_size, model.arch.vision.image_size, generator=generator)
    return images, tokens


@torch.no_grad()
def our_logits(model: CLIP, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    image, text, scale = model(images, tokens)
    return scale.exp() * image @ text.T


@torch.no_grad()
def open_clip_logits(twin: torch.nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    image, text, scale = twin(images, tokens)
    return scale * image @ text.T


@torch.no_grad()
def transformers_logits(twin: torch.nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return twin(pixel_values=images, input_ids=tokens).logits_per_image


def assert_logits_agree(model: CLIP, open_clip: ModuleType, transformers: ModuleType) -> None:
    images, tokens = batch(model)
    ours = our_logits(model, images, tokens)
    assert ours.std() > 0.05  # comparing constants would prove nothing
    theirs = open_clip_logits(open_clip_twin(open_clip, model), images, tokens)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    theirs = transformers_logits(transformers_twin(transformers, model), images, tokens)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_open_clips(preset: str, open_clip: ModuleType) -> None:
    with torch.device("meta"):
        theirs = open_clip.CLIP(**to_open_clip.config(card(preset))["model_cfg"])
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert peer_shapes(open_clip_entries(PRESETS[preset]), PRESETS[preset]) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_transformers(preset: str, transformers: ModuleType) -> None:
    with torch.device("meta"):
        theirs = transformers.MetaClip2Model(transformers.MetaClip2Config(**huggingface.config(card(preset))))
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert peer_shapes(huggingface_entries(PRESETS[preset]), PRESETS[preset]) == expected


@pytest.mark.parametrize("preset", NAMED_IN_OPEN_CLIP)
def test_the_preset_is_the_model_of_that_name_in_open_clip(preset: str, open_clip: ModuleType) -> None:
    theirs = open_clip.get_model_config(NAMED_IN_OPEN_CLIP[preset])
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in open_clip.CLIP(**theirs).state_dict().items()}
    assert peer_shapes(open_clip_entries(PRESETS[preset]), PRESETS[preset]) == shapes
    # Heads, activation and pooling do not show in shapes. The importer reads and checks the rest.
    resize = {"resize_mode": PRESETS[preset].eval_resize}
    arch, prefix = to_open_clip.architecture({"model_cfg": theirs, "preprocess_cfg": resize}, preset)
    assert (arch, prefix) == (PRESETS[preset], "")


@pytest.mark.parametrize("tag_name", ["ViT-H-14-worldwide-378", "ViT-bigG-14-worldwide-378", "ViT-H-14-worldwide"])
def test_evaluation_resizes_as_the_released_weights_want(tag_name: str, open_clip: ModuleType) -> None:
    tag = open_clip.get_pretrained_cfg(tag_name, "metaclip2_worldwide")
    assert PRESETS[tag_name].eval_resize == tag.get("resize_mode", "shortest")


@pytest.mark.parametrize("preset", CUT)
def test_logits_agree_at_every_width(
    preset: str, cut_model: Callable[..., CLIP], open_clip: ModuleType, transformers: ModuleType
) -> None:
    assert_logits_agree(cut_model(preset, CUT[preset]), open_clip, transformers)


@pytest.mark.parametrize("preset", ["ViT-S-16-worldwide", "ViT-M-16-worldwide-mt5"])
def test_logits_agree_at_full_depth(
    preset: str, cut_model: Callable[..., CLIP], open_clip: ModuleType, transformers: ModuleType
) -> None:
    assert_logits_agree(cut_model(preset, layers=99), open_clip, transformers)


def test_logits_agree_with_quick_gelu_and_an_odd_mlp(
    tiny_arch: ClipArchitecture, open_clip: ModuleType, transformers: ModuleType
) -> None:
    for quick_gelu in (False, True):
        arch = dataclasses.replace(tiny_arch, quick_gelu=quick_gelu)
        assert_logits_agree(build_clip(arch, seed=2).eval(), open_clip, transformers)


def test_the_two_activations_differ(cut_model: Callable[..., CLIP]) -> None:
    """Otherwise the tests above could not distinguish them."""
    model = cut_model("ViT-S-16-worldwide")
    quick = CLIP(dataclasses.replace(model.arch, quick_gelu=True)).eval()
    quick.load_state_dict(model.state_dict())
    images, tokens = batch(model)
    assert (our_logits(model, images, tokens) - our_logits(quick, images, tokens)).abs().max() > 100 * TOLERANCE
