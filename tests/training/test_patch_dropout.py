"""Patch dropout: which patches are kept, what is computed of them, and runs on any number of ranks."""

import shutil

import numpy as np
import pytest
import torch

from mc2_hpc.config import load_config
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import build_clip, flops_per_pair
from mc2_hpc.models.presets import resolve
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import resolve_checkpoint
from mc2_hpc.training.patch_dropout import kept_patches, num_kept
from tests.faults.diary import rows
from tests.training import zero_worker

KEYS = [f"{number:06d}" for number in range(400)]
DRAW = {"num_patches": 49, "share": 0.5, "seed": 0, "step": 3}


def test_each_image_keeps_its_own_patches():
    kept = kept_patches(KEYS, **DRAW)
    assert kept.shape == (400, 24) and kept.dtype == torch.int64
    assert (kept[:, 1:] > kept[:, :-1]).all() and kept.min() >= 0 and kept.max() < 49
    # A function of the key, whatever else is in the batch; of the seed, and of the step.
    assert torch.equal(kept_patches(KEYS[100:103], **DRAW), kept[100:103])
    for change in ({"seed": 1}, {"step": 4}):
        assert (kept_patches(KEYS, **{**DRAW, **change}) != kept).any(dim=1).float().mean() > 0.99


def test_draws_are_uniform():
    """Each patch is kept by about half of the images (within 5 standard deviations), in step after step."""
    counts = np.zeros(49)
    for step in range(5):
        counts += np.bincount(kept_patches(KEYS, **{**DRAW, "step": step}).flatten().numpy(), minlength=49)
    share = 24 / 49
    assert np.abs(counts - 2000 * share).max() < 5 * np.sqrt(2000 * share * (1 - share))


@pytest.mark.parametrize("num, share, expected", [(196, 0.5, 98), (49, 0.5, 24), (256, 0.75, 64), (4, 0.9, 1)])
def test_the_number_kept_is_open_clips(num, share, expected):
    assert num_kept(num, share) == expected
    assert num_kept(num, 0.0) == num


@pytest.fixture(scope="module")
def clip():
    return build_clip(resolve(zero_worker.run_config(0, model=MODEL).model), seed=0)


MODEL = {
    "preset": "ViT-S-16-worldwide",
    "embed_dim": 32,
    "vision": {"image_size": 64, "width": 64, "layers": 2, "head_width": 32},
    "text": {"vocab_size": 100, "context_length": 12, "width": 48, "heads": 3, "layers": 2},
}


def test_what_is_computed_is_what_open_clip_computes(clip, open_clip):
    """open_clip embeds all patches, adds their positions and then takes the kept ones: features and all gradients."""
    kept = kept_patches(KEYS[:5], **{**DRAW, "num_patches": 16})
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found, expected = [], []
    for parts, features in ((found, clip.encode_image(images, kept=kept)), (expected, every_patch(clip, images, kept))):
        clip.zero_grad()
        features.square().sum().backward()
        parts += [features.detach(), *(parameter.grad for parameter in clip.vision.parameters())]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    everything = torch.arange(16).expand(5, -1)
    torch.testing.assert_close(clip.encode_image(images, kept=everything), clip.encode_image(images))


def every_patch(clip, images, kept):
    from open_clip.transformer import PatchDropout as Theirs

    vision = clip.vision
    x = vision.patch_embedding(vision._patchify(images))
    x = torch.cat([vision.class_embedding.expand(len(x), 1, -1), x], dim=1) + vision.positional_embedding
    theirs = Theirs(0.5)
    with pytest.MonkeyPatch.context() as patch:
        # They keep the largest draws of a normal distribution.
        draws = torch.zeros(len(images), 16).scatter_(1, kept, 1.0)
        patch.setattr(torch, "randn", lambda *size: draws)
        x = theirs(x)
    assert x.shape[1] == 9
    x = vision.transformer(vision.norm_pre(x), pooled_B=9 * torch.arange(len(images)))
    return vision.norm_post(x) @ vision.projection


def test_operations_are_those_of_the_kept_patches(clip):
    whole, half, none = (flops_per_pair(clip.arch, 8, num_patches=num) for num in (None, 8, 0))
    assert flops_per_pair(clip.arch, 8, num_patches=16) == whole
    assert 0.4 < (half - none) / (whole - none) < 0.6


def test_runs_are_the_same_on_any_number_of_ranks_and_resume(ranks_of, module_config, tmp_path):
    """Also in micro-batches, whose two passes must drop the same patches."""
    settings = ["model.patch_dropout=0.5", "model.vision.image_size=64", "steps=8", "log_every=1", "checkpoint.every=4"]
    runs = {"two": (2, []), "three": (3, ["micro_batch=4", "zero.stage=3"]), "resumed": (2, [])}
    for name, (ranks, more) in runs.items():
        output = tmp_path / name
        if name == "resumed":
            shutil.copytree(tmp_path / "two", output)
            shutil.rmtree(output / "checkpoints" / "step-00000008")
        ranks_of(ranks, "-m", "mc2_hpc.cli", "train", module_config, f"output={output}", *settings, *more)
    expected = rows(tmp_path / "two")
    for step, row in rows(tmp_path / "three").items():
        assert row["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5), step
    assert {step: row["loss"] for step, row in rows(tmp_path / "resumed").items()} == {
        step: row["loss"] for step, row in expected.items()
    }
    two, resumed = (TensorFiles(resolve_checkpoint(tmp_path / name), "model") for name in ("two", "resumed"))
    assert all(torch.equal(two.get(name), resumed.get(name)) for name in two.names())


def test_bad_shares_are_refused(module_config):
    with pytest.raises(UserError, match=r"model.patch_dropout=1.0: must be in \[0, 1\)"):
        load_config(module_config, ["model.patch_dropout=1"])


def test_nothing_is_dropped_for_a_tower_that_is_not_trained(module_config):
    with pytest.raises(UserError, match="freeze.vision=all: no part of the image tower is trained; set one"):
        load_config(module_config, ["model.patch_dropout=0.5", "freeze.vision=all"])
    assert load_config(module_config, ["model.patch_dropout=0.5", "freeze.vision=1"]).model.patch_dropout == 0.5
