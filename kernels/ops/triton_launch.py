"""What every Triton kernel needs to know about the machine it is asked to run on."""

import os
from importlib.util import find_spec

import torch

# Triton's interpreter runs programs one after another; a few are enough to test that their sums are added up.
_INTERPRETED_PROCESSORS = 2


def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device, or ``None`` if they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"tensors are on {device.type}, which triton does not compile for (set TRITON_INTERPRET=1 to interpret)"
    return None


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, on which a kernel that adds up rows spreads its programs."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
