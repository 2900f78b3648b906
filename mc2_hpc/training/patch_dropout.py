"""Patch dropout: training on a random part of each image's patches (FLIP, arXiv 2212.00794; CLIPA, arXiv 2305.07017).

The patches that an image keeps are a pure function of (seed, step, key): the same on any number of ranks, in both
passes of GradCache, and after a resume.

Shape suffixes: B batch, N patches, K kept patches.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mc2_hpc.config import RunConfig
from mc2_hpc.draws import WORD_STEP, hash_keys, random_uint64
from mc2_hpc.models.presets import ClipArchitecture


def num_kept(num_patches: int, share: float) -> int:
    """Patches that remain of ``num_patches`` if ``share`` of them are dropped; at least one (open_clip's rule)."""
    return max(1, int(num_patches * (1 - share)))


def num_patches(config: RunConfig, arch: ClipArchitecture) -> int:
    """Patches of an image that a step computes; 0 with stored features."""
    if config.data.features is not None:
        return 0
    return num_kept(arch.vision.num_patches, config.model.patch_dropout)


def kept_patches(keys: Sequence[str], *, num_patches: int, share: float, seed: int, step: int) -> Tensor:
    """The patches that each sample keeps in ``step``, in ascending order: (B, K) int64 on the host."""
    with np.errstate(over="ignore"):
        words_BN = hash_keys(keys)[:, None] + np.arange(num_patches, dtype=np.uint64) * np.uint64(WORD_STEP)
    draws = random_uint64(words_BN.reshape(-1), seed=seed, epoch=step, purpose="patch dropout")
    num = num_kept(num_patches, share)
    kept_BK = np.argpartition(draws.reshape(words_BN.shape), num - 1, axis=1)[:, :num]
    kept_BK.sort(axis=1)
    return torch.from_numpy(kept_BK)


class PatchDropout:
    """The patches that a run's steps compute."""

    def __init__(self, config: RunConfig, arch: ClipArchitecture, device: torch.device) -> None:
        self._share, self._seed = config.model.patch_dropout, config.data.seed
        self._num_patches = arch.vision.num_patches
        self._device = device

    def __call__(self, keys: Sequence[str], step: int) -> Tensor | None:
        """:func:`kept_patches` of step number ``step`` (from 0) on the device; ``None`` if none are dropped."""
        if not self._share:
            return None
        kept_BK = kept_patches(keys, num_patches=self._num_patches, share=self._share, seed=self._seed, step=step)
        if self._device.type == "cuda":
            kept_BK = kept_BK.pin_memory()  # a copy from other memory would wait for the device
        return kept_BK.to(self._device, non_blocking=True)
