"""Every parameter is drawn from the same distribution as in open_clip."""

import dataclasses
from types import ModuleType

import pytest
import torch
from scipy import stats

from mc2_hpc.conversion.keys import from_peer, open_clip_entries
from mc2_hpc.conversion.open_clip import config
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import PRESETS
from mc2_hpc.models.weights import ModelCard

_S16 = PRESETS["ViT-S-16-worldwide"]
ARCH = dataclasses.replace(
    _S16,
    embed_dim=320,  # differs from the widths, so that a scale from the wrong size is detected
    vision=dataclasses.replace(_S16.vision, width=256, mlp_width=1280, layers=3, image_size=64),
    text=dataclasses.replace(_S16.text, width=192, heads=3, layers=2, vocab_size=2000),
)
_SAMPLE = 20_000


@pytest.fixture(scope="module")
def pairs(open_clip: ModuleType) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = open_clip.CLIP(**config(ModelCard(arch=ARCH, tokenizer_style="xlmv"))["model_cfg"]).state_dict()
    ours = build_clip(ARCH, seed=6).state_dict()
    named = dict(from_peer(open_clip_entries(ARCH), theirs.__getitem__))
    return {name: (ours[name].flatten().double(), named[name].flatten().double()) for name in ours}


def test_constants_are_the_same(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    constant = [name for name, (_, theirs) in pairs.items() if (theirs == theirs[0]).all()]
    assert len(constant) == 1 + 6 + 4 * 5 + 2 * 5  # logit_scale, outer norms, and each block's norms and two biases
    for name in constant:
        assert torch.equal(*pairs[name]), name


def test_spread_and_centre_are_the_same(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Within six standard errors, which is 0.7 % of the standard deviation for the larger matrices."""
    for name, (ours, theirs) in pairs.items():
        if (theirs == theirs[0]).all():
            continue
        n = ours.numel()
        assert abs((ours.std() / theirs.std()).log()) < 6 * n**-0.5, name
        assert abs(ours.mean() - theirs.mean()) < 6 * (2 / n) ** 0.5 * theirs.std(), name


def test_shapes_of_the_distributions_are_the_same(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Two-sample Kolmogorov-Smirnov test, and tails: a uniform distribution is bounded, a normal one is not."""
    for name, (ours, theirs) in pairs.items():
        if (theirs == theirs[0]).all():
            continue
        assert stats.ks_2samp(ours[:_SAMPLE].numpy(), theirs[:_SAMPLE].numpy()).pvalue > 1e-5, name
        uniform = [bool(x.abs().max() < 1.85 * x.std()) for x in (ours, theirs)]
        assert uniform[0] == uniform[1], name
        if uniform[1] and ours.numel() > 1000:
            assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01), name


def test_both_families_of_distributions_occur(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Otherwise the tests above would be void: the image tower's matrices are uniform, the text tower's normal."""
    for tower, uniform in (("vision", True), ("text", False)):
        for matrix in ("attention.qkv", "attention.out", "fc", "proj"):
            x = pairs[f"{tower}.transformer.blocks.1.{matrix}.weight"][0]
            assert bool(x.abs().max() < 1.85 * x.std()) == uniform
