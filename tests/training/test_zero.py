"""Every ZeRO stage, micro-batching and number of ranks trains like plain PyTorch with open_clip's loss."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training import zero_worker as worker
from tests.training.plain import assert_same_weights, train_plainly

pytestmark = pytest.mark.timeout(900)  # nineteen trainings


@pytest.fixture(scope="module")
def plain():
    """20 steps on one process, without an engine."""
    return train_plainly(worker.run_config(0))


# One rank is the plain case; 16 is not a multiple of 3.
CASES_BY_RANKS = {
    1: ["zero1", "zero3_gradcache"],
    2: [name for name, *_ in worker.CASES],
    3: ["zero0_gradcache", "zero1", "zero2", "zero3"],
}
SLOW = {(2, name) for name in ("zero0_gradcache", "zero1", "zero2", "zero2_gradcache", "zero3")}
"""On three ranks, whose shares are uneven, the same is fast; and stage 2 with GradCache without packing."""


@pytest.fixture(scope="module")
def trained(ranks_of, tmp_path_factory):
    """``trained(ranks, case)``: the worker's output folder; fast cases are trained together, and so are slow ones."""
    folders = {}

    def train(ranks: int, name: str) -> Path:
        key = ranks, (ranks, name) in SLOW
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(f"zero{ranks}")
            names = [each for each in CASES_BY_RANKS[ranks] if ((ranks, each) in SLOW) == key[1]]
            ranks_of(ranks, worker.__file__, folders[key], *names)
        return folders[key]

    return train


def runs(precision: str) -> list[Any]:
    """(ranks, case) of every run in ``precision``."""
    wanted = {name for name, *_, found, _ in worker.CASES if found == precision}
    every = [(ranks, name) for ranks, names in CASES_BY_RANKS.items() for name in names if name in wanted]
    return [pytest.param(*run, marks=pytest.mark.slow if run in SLOW else ()) for run in every]


def rows_of(folder: Path, name: str) -> torch.Tensor:
    return torch.tensor(json.loads((folder / "rows.json").read_text())[name], dtype=torch.float64)


@pytest.mark.parametrize("ranks, name", runs("fp32"))
def test_equals_plain_pytorch(trained, plain, ranks, name):
    rows, reference = rows_of(trained(ranks, name), name), plain[0]
    assert rows.shape == (20, 3)
    torch.testing.assert_close(rows, reference, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ranks, name", runs("fp32"))
def test_weights_equal_plain_pytorch(trained, plain, ranks, name):
    assert_same_weights(load_file(trained(ranks, name) / f"{name}.safetensors"), plain[1])


@pytest.mark.parametrize("ranks, name", runs("bf16"))
def test_bf16_stays_close(trained, plain, ranks, name):
    """bf16 autocast: the loss of each of 20 steps within 1 % of fp32's; the scale, which stays fp32, within 0.5 %."""
    rows, reference = rows_of(trained(ranks, name), name), plain[0]
    torch.testing.assert_close(rows[:, 0], reference[:, 0], rtol=1e-2, atol=0)
    torch.testing.assert_close(rows[:, 2], reference[:, 2], rtol=5e-3, atol=0)
    # A bf16 scale would move in steps of 2^-7.
    changes = (rows[1:, 2] - rows[:-1, 2]).abs()
    assert 0 < changes.min() and changes.max() < 2**-8
