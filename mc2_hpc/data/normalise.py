"""The only preprocessing step that runs on the device: bytes to normalised floats."""

from functools import lru_cache

import torch

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Per RGB channel in [0, 1]; OpenAI CLIP's values, as in the recipe."""


Channels = tuple[float, float, float]


def normalise(
    images: torch.Tensor, dtype: torch.dtype = torch.float32, *, mean: Channels = MEAN, std: Channels = STD
) -> torch.Tensor:
    """``(images / 255 - mean) / std`` of uint8 ``(b, 3, H, W)``, computed in float32 and returned as ``dtype``."""
    means, stds = _constants(images.device, mean, std)
    return images.to(torch.float32).div_(255).sub_(means).div_(stds).to(dtype)


@lru_cache(maxsize=16)
def _constants(device: torch.device, mean: Channels, std: Channels) -> tuple[torch.Tensor, torch.Tensor]:
    # Cached, because creating them would copy from host to device, and wait for it, in every step.
    shape = (1, 3, 1, 1)
    return torch.tensor(mean, device=device).view(shape), torch.tensor(std, device=device).view(shape)
