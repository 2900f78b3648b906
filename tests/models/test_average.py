"""Reading the moving average of a checkpoint's weights."""

import pytest
import torch

from mc2_hpc.errors import UserError
from mc2_hpc.models.average import has_average, weight_files
from mc2_hpc.models.weights import write_tensors


@pytest.fixture
def folder(tmp_path):
    """Two weights; one of them has an average, the other one was frozen."""
    write_tensors(tmp_path / "model.0.safetensors", {"trained": torch.ones(3), "frozen": torch.full((2,), 7.0)})
    write_tensors(tmp_path / "ema.0.safetensors", {})  # of a writer that had none to write
    write_tensors(tmp_path / "ema.1.safetensors", {"trained": torch.full((3,), 0.5)})
    return tmp_path


def test_the_average_is_completed_by_the_weights(folder):
    assert has_average(folder)
    files = weight_files(folder, ema=True)
    assert files.names() == ["frozen", "trained"]
    assert files.get_fp32("trained").tolist() == [0.5] * 3 and files.get_fp32("frozen").tolist() == [7.0] * 2
    assert weight_files(folder).get_fp32("trained").tolist() == [1.0] * 3


def test_shapes_are_the_averages_own(folder):
    write_tensors(folder / "ema.1.safetensors", {"trained": torch.zeros(4, dtype=torch.float16)})
    files = weight_files(folder, ema=True)
    assert files.shape("trained") == (4,) and files.stored_type("trained") == "F16"
    assert files.shape("frozen") == (2,) and files.stored_type("frozen") == "F32"


def test_what_cannot_be_read_is_named(folder):
    write_tensors(folder / "ema.2.safetensors", {"unknown": torch.zeros(1)})
    with pytest.raises(UserError, match="damaged checkpoint: it has the average of 'unknown', but no such weight"):
        weight_files(folder, ema=True)
    for path in folder.glob("ema.*"):
        path.unlink()
    assert not has_average(folder)
    with pytest.raises(UserError, match=r"has no moving average of its weights \(optim.ema_decay\); leave out --ema"):
        weight_files(folder, ema=True)
