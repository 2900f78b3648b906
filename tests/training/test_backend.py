"""``optim.backend``: every AdamW trains and resumes like plain PyTorch; errors say what to install."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from mc2_hpc.config import OptimConfig
from mc2_hpc.errors import UserError
from mc2_hpc.training import optim
from tests.training import backend_worker as worker
from tests.training import fused_adam
from tests.training.plain import assert_same_weights, train_plainly


@pytest.fixture(scope="module")
def plain():
    return train_plainly(worker.run_config("torch", 0))


@pytest.fixture(scope="module")
def trained(ranks_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backends")
    ranks_of(2, worker.__file__, folder)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend, stage", worker.CASES)
def test_equals_plain_pytorch(trained, plain, backend, stage):
    """Each step's numbers and the final weights; half the steps are after a resume, which restores the step count."""
    name = worker.name_of(backend, stage)
    rows = torch.tensor(json.loads((trained / "rows.json").read_text())[name], dtype=torch.float64)
    torch.testing.assert_close(rows, plain[0], rtol=1e-5, atol=0)
    assert_same_weights(load_file(trained / f"{name}.safetensors"), plain[1])


def groups():
    return [{"params": [torch.nn.Parameter(torch.ones(3))], "lr_factor": 1.0}]


def test_apex_gets_nvidias_arguments(monkeypatch):
    """By keyword, so that a changed default of theirs changes nothing; learning rates are set before every step."""
    module = type(sys)("apex.optimizers")
    module.FusedAdam = fused_adam.ApexFusedAdam
    monkeypatch.setitem(sys.modules, "apex", type(sys)("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    config = OptimConfig(backend="apex", beta2=0.9, eps=1e-5)
    found = optim.tower_optimizer(groups(), config, "cuda")
    assert type(found) is fused_adam.ApexFusedAdam
    (group,) = found.param_groups
    assert (group["betas"], group["eps"], group["lr"], group["weight_decay"]) == ((0.9, 0.9), 1e-5, 0.0, 0.0)


@pytest.mark.parametrize("backend", ["deepspeed", "apex"])
def test_a_cpu_is_refused(backend):
    with pytest.raises(UserError, match=f"optim.backend={backend}: its FusedAdam runs on a GPU, not on cpu; set optim"):
        optim.tower_optimizer(groups(), OptimConfig(backend=backend), "cpu")


def test_without_apex_the_error_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"^optim.backend=apex: FusedAdam does not load .* APEX_CUDA_EXT=1.*=torch$"):
        optim.tower_optimizer(groups(), OptimConfig(backend="apex"), "cuda")


def test_a_failed_build_says_what_it_needs(monkeypatch):
    import deepspeed.ops.adam.fused_adam as theirs

    class Builder:
        def load(self):
            raise RuntimeError("Unable to JIT load the fused_adam op due to ninja not being installed.\nmore")

    monkeypatch.setattr(theirs, "FusedAdamBuilder", Builder)
    with pytest.raises(
        UserError, match=r"\(Unable to JIT .* installed.\); .*needs ninja and the CUDA toolkit"
    ) as caught:
        optim.tower_optimizer(groups(), OptimConfig(backend="deepspeed"), "cuda")
    assert "\n" not in str(caught.value)


def test_apex_does_not_count_the_pieces_of_stage_3():
    with pytest.raises(UserError, match="optim.backend=apex and zero.stage=3: apex counts the steps of a group"):
        worker.run_config("apex", 3)


def test_an_unknown_backend_is_named():
    with pytest.raises(UserError, match="optim.backend"):
        OptimConfig(backend="lamb")
