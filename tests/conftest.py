"""Fixtures and shims that every test may use."""

from pathlib import Path

import pytest
import torch


def _define_torchvision_schemas() -> None:
    """Let torchvision import where only its CUDA build exists: it needs these two operator schemas to be defined."""
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_torchvision_library"] = library  # the schemas live as long as this object


if not torch.cuda.is_available():
    _define_torchvision_schemas()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data that lies beside a checkout on some machines; tests that need it skip elsewhere."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data beside the checkout ({folder.name} folder of shared is missing)")
    return folder
