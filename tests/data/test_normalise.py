"""Normalisation on the device equals torchvision's ToTensor and Normalize."""

from types import ModuleType

import torch

from mc2_hpc.data.normalise import MEAN, STD, normalise


def test_normalise_equals_torchvision_bit_for_bit(open_clip: ModuleType) -> None:
    from torchvision.transforms import Normalize  # importable if open_clip is

    images = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 4, 1)
    expected = Normalize(MEAN, STD)(images.to(torch.float32) / 255)
    assert torch.equal(normalise(images), expected)
    half = normalise(images, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, expected.to(torch.bfloat16))


def test_input_is_left_alone() -> None:
    images = torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)
    normalise(images)
    assert (images == 200).all()
