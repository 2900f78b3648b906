"""A frozen part runs without keeping activations, and with random weights only after a warning."""

import dataclasses
import logging
import weakref
from itertools import pairwise

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mc2_hpc.config import FreezeConfig, config_from_dict
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.models.packed_captions import caption_lengths
from mc2_hpc.models.presets import resolve
from mc2_hpc.training.freezing import check_frozen, freeze
from tests.training import zero_worker

LAYERS = 4


@pytest.fixture(scope="module")
def clip() -> CLIP:
    arch = resolve(zero_worker.run_config(0).model)
    vision, text = (dataclasses.replace(tower, layers=LAYERS) for tower in (arch.vision, arch.text))
    return build_clip(dataclasses.replace(arch, vision=vision, text=text), seed=0)


class Kept:
    """A tensor that autograd keeps for the backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_bytes(clip: CLIP, tower: str, frozen: str) -> int:
    """Bytes of activations that are kept after the forward pass of a tower; parameters and repeats do not count."""
    freeze(clip, FreezeConfig(**{tower: frozen}))
    every: list[weakref.ref[Kept]] = []

    def keep(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        every.append(weakref.ref(kept))
        return kept

    images, tokens = zero_worker.batches()[0]
    with saved_tensors_hooks(keep, lambda kept: kept.tensor):
        if tower == "vision":
            features = clip.encode_image(images / 255)
        else:
            features = clip.encode_text(tokens, lengths=caption_lengths(tokens, 2))
    storages = [kept.tensor.untyped_storage() for ref in every if (kept := ref()) is not None]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in clip.parameters()}
    del features
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in parameters}.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_frozen_part_keeps_nothing(clip, tower, recompute):
    clip.set_recompute(recompute)
    found = [kept_bytes(clip, tower, str(blocks)) for blocks in range(LAYERS + 1)]
    saved = [first - second for first, second in pairwise(found)]
    assert saved[1] == saved[2] > 0 and min(saved) >= 0  # blocks in the middle
    assert 0 < found[-1] < found[-2]  # the final norm and the projection
    assert kept_bytes(clip, tower, "all") == 0


def test_thawing_again(clip):
    freeze(clip, FreezeConfig(vision="all", text="1", logit_scale=True))
    assert not clip.logit_scale.requires_grad and not any(p.requires_grad for p in clip.vision.parameters())
    freeze(clip, FreezeConfig())
    assert all(p.requires_grad for p in clip.parameters())


@pytest.mark.parametrize("init_from, said", [(None, True), ("runs/base", False)])
def test_random_weights_are_frozen_with_a_warning(caplog, init_from, said):
    config = config_from_dict({"freeze": {"vision": "all"}, "model": {"init_from": init_from}})
    with caplog.at_level(logging.WARNING):
        check_frozen(resolve(config.model), config)
    assert ("freeze.vision=all, but model.init_from is not set" in caplog.text) == said
