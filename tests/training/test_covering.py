"""Switches of the step that must not change what is learnt, in every combination of two, against plain PyTorch."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training import covering_worker as worker
from tests.training.plain import assert_same_weights, train_plainly


def test_every_two_values_meet():
    met = {frozenset(pair) for row in worker.ROWS for pair in itertools.combinations(row.items(), 2)}
    assert met >= worker.pairs(worker.SWITCHES, worker.allowed) and all(map(worker.allowed, worker.ROWS))
    assert worker.covering_array(worker.SWITCHES, worker.allowed) == worker.ROWS
    assert len(worker.ROWS) < 25


@pytest.fixture(scope="module")
def plain():
    """20 steps of open_clip's losses, by kind."""
    rows = {row["loss.kind"]: row for row in worker.ROWS}
    return {kind: train_plainly(worker.run_config(row)) for kind, row in rows.items()}


@pytest.fixture(scope="module")
def trained(torchrun, tmp_path_factory):
    pytest.importorskip("triton", reason="the package triton is not installed")
    folder = tmp_path_factory.mktemp("covering")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        torchrun(2, "-m", worker.__name__, folder, timeout=3000)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is chosen where there is no GPU")
@pytest.mark.parametrize("number", range(len(worker.ROWS)))
def test_equals_plain_pytorch(trained, plain, number):
    """On two ranks: numbers of every step, and final weights."""
    rows = json.loads((trained / "rows.json").read_text())[str(number)]
    expected, weights = plain[worker.ROWS[number]["loss.kind"]]
    torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), expected, rtol=2e-5, atol=0)
    assert_same_weights(load_file(trained / f"{number}.safetensors"), weights, tolerance=2e-4)
