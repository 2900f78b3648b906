"""Training with the sigmoid loss: like plain PyTorch with open_clip's SigLipLoss, resumed, exported and evaluated."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import mc2_hpc
from mc2_hpc.config import config_from_dict
from mc2_hpc.conversion.convert import convert
from mc2_hpc.errors import UserError
from mc2_hpc.models.tensor_files import TensorFiles
from tests.training import sigmoid_worker as worker
from tests.training.plain import assert_same_weights, train_plainly

NAMES = {
    1: ["zero0", "zero1_gradcache"],
    2: [name for name, *_ in worker.CASES],
    3: ["zero1_gradcache", "zero2_gradcache"],
}
RUNS = [(ranks, name) for ranks, names in NAMES.items() for name in names]


@pytest.fixture(scope="module")
def plain():
    return train_plainly(worker.run_config())


@pytest.fixture(scope="module")
def trained(ranks_of, tmp_path_factory):
    folders = {}
    for ranks, names in NAMES.items():
        folders[ranks] = tmp_path_factory.mktemp(f"sigmoid{ranks}")
        ranks_of(ranks, worker.__file__, folders[ranks], *names)
    return folders


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks, name", RUNS)
def test_equals_plain_pytorch(trained, plain, ranks, name):
    """Loss, gradient norm, scale and bias of every step, and the final weights."""
    rows = torch.tensor(json.loads((trained[ranks] / "rows.json").read_text())[name], dtype=torch.float64)
    assert rows.shape == (20, 4)
    torch.testing.assert_close(rows, plain[0], rtol=1e-5, atol=0)
    assert_same_weights(load_file(trained[ranks] / f"{name}.safetensors"), plain[1])
    assert plain[0][0, 3] != plain[0][-1, 3]  # the bias is trained


def train(ranks_of, config, run, processes, *overrides):
    arguments = [f"output={run}", "loss.kind=sigmoid", "checkpoint.every=4", "log_every=1", *overrides]
    ranks_of(processes, "-m", "mc2_hpc.cli", "train", config, *arguments)


@pytest.mark.timeout(600)
def test_a_run_keeps_its_bias(ranks_of, module_config, tmp_path):
    """Bitwise over a resume; in rows, checkpoints, exports and ``mc2_hpc.load``."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    constant = "optim.schedule=constant"
    train(ranks_of, module_config, whole, 2, constant, "steps=8", "optim.ema_decay=0.5")
    for steps in (4, 8):
        train(ranks_of, module_config, halved, 2, constant, f"steps={steps}", "optim.ema_decay=0.5")
    checkpoints = [run / "checkpoints" / "step-00000008" for run in (whole, halved)]
    for prefix in ("model", "optimizer", "ema"):
        one, other = (TensorFiles(folder, prefix) for folder in checkpoints)
        assert one.names() == other.names() and any("logit_bias" in name for name in one.names())
        assert all(torch.equal(one.get(name), other.get(name)) for name in one.names())

    bias = float(TensorFiles(checkpoints[0], "model").get("logit_bias"))
    scale = float(TensorFiles(checkpoints[0], "model").get("logit_scale").exp())
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert bias not in (0, -10) and rows[-1]["logit_bias"] == pytest.approx(bias, rel=1e-6)
    assert abs(rows[0]["logit_bias"] + 10) < 0.1 and abs(math.log(rows[0]["logit_scale"] / 10)) < 0.1

    for source in (whole, convert(whole, "open_clip", tmp_path / "theirs"), convert(whole, "onnx", tmp_path / "onnx")):
        assert mc2_hpc.load(source).dual.logits() == pytest.approx((scale, bias), rel=1e-6)
    back = convert(tmp_path / "theirs", "mc2", tmp_path / "back")
    assert float(TensorFiles(back, "model").get("logit_bias")) == bias


@pytest.mark.timeout(600)
def test_weights_of_a_softmax_model_get_a_new_bias(ranks_of, module_config, tmp_path):
    """And those of a sigmoid model lose theirs; a run cannot change its loss."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    kind, no_step = "loss.kind={}".format, ["steps=1", "optim.lr=0"]
    ranks_of(1, "-m", "mc2_hpc.cli", "train", module_config, f"output={first}", *no_step)
    start = f"model.init_from={first}"
    ranks_of(1, "-m", "mc2_hpc.cli", "train", module_config, f"output={second}", start, kind("sigmoid"), *no_step)
    start = f"model.init_from={second}"
    ranks_of(1, "-m", "mc2_hpc.cli", "train", module_config, f"output={third}", start, *no_step)
    one, two, three = (TensorFiles(run / "checkpoints/step-00000001", "model") for run in (first, second, third))
    assert set(two.names()) - set(one.names()) == {"logit_bias"} and float(two.get("logit_bias")) == -10
    assert one.names() == three.names()
    for name in one.names():
        assert torch.equal(one.get(name), two.get(name)) and torch.equal(one.get(name), three.get(name)), name


@pytest.mark.timeout(600)
def test_a_frozen_scale_stays_as_it_starts(ranks_of, module_config, tmp_path):
    """Beyond the limit too, though the bias beside it is trained."""
    train(ranks_of, module_config, tmp_path, 1, "steps=2", "freeze.logit_scale=true", "optim.max_logit_scale=2")
    weights = TensorFiles(tmp_path / "checkpoints/step-00000002", "model")
    assert float(weights.get("logit_scale")) == pytest.approx(math.log(10))
    assert float(weights.get("logit_bias")) != -10


def test_a_teacher_needs_the_softmax():
    with pytest.raises(UserError, match="loss.kind=sigmoid and distill: a teacher is compared by softmax"):
        config_from_dict({"loss": {"kind": "sigmoid"}, "distill": {"teacher": "/t"}})
