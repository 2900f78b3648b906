"""What ships, on a GPU: ``auto``, the engine at every stage, the trainer with its checkpoints, GradCache and DALI."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mc2_hpc
from mc2_hpc.kernels.contrastive.dispatch import choose_backend
from mc2_hpc.kernels.layer_norm import layer_norm
from mc2_hpc.kernels.quick_gelu import quick_gelu
from mc2_hpc.models.fused import resolve_activation, resolve_norm
from mc2_hpc.models.tensor_files import TensorFiles
from tests.training import sigmoid_worker, zero_worker
from tests.training.plain import assert_same_weights, train_plainly

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

FUSED = "model.quick_gelu=true"
"""The preset of the tiny runs has GELU, which needs no kernel of ours."""


def test_auto_selects_the_kernels():
    for dtype, expected in ((torch.bfloat16, "triton"), (torch.float16, "triton"), (torch.float32, "tiled")):
        assert choose_backend("auto", torch.device("cuda"), dtype) == expected
    assert resolve_norm("auto", "cuda") is layer_norm and resolve_activation("auto", "cuda") is quick_gelu


@pytest.fixture(scope="module")
def trained(torchrun, tmp_path_factory):
    """One process on one GPU: the worker's rows and weights, by worker."""
    folders = {}
    for worker in (zero_worker, sigmoid_worker):
        folders[worker] = tmp_path_factory.mktemp("trained")
        torchrun(1, "-m", worker.__name__, folders[worker], *(case[0] for case in worker.CASES))
    return folders


@pytest.mark.parametrize(
    "worker, name",
    [
        *((zero_worker, name) for name, *_, precision, _ in zero_worker.CASES if precision == "fp32"),
        *((sigmoid_worker, case[0]) for case in sigmoid_worker.CASES),
    ],
)
def test_engine_equals_plain_pytorch_on_the_cpu(trained, worker, name):
    """Every stage, with and without micro-batches and recomputation. The GPU adds in another order."""
    rows = json.loads((trained[worker] / "rows.json").read_text())[name]
    expected, weights = train_plainly(zero_worker.run_config(0) if worker is zero_worker else worker.run_config())
    torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), expected, rtol=1e-3, atol=0)
    assert_same_weights(load_file(trained[worker] / f"{name}.safetensors"), weights, tolerance=1e-3)


def train(torchrun, config, run, *overrides):
    """Train on one GPU; returns the losses by step."""
    arguments = [f"output={run}", "log_every=1", "checkpoint.every=6", FUSED, *overrides]
    torchrun(1, "-m", "mc2_hpc.cli", "train", config, *arguments)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)


@pytest.fixture(scope="module")
def undisturbed(torchrun, module_config, tmp_path_factory):
    """A bf16 run of 12 steps with every ``auto``, and its losses."""
    run = tmp_path_factory.mktemp("undisturbed")
    return run, train(torchrun, module_config, run, "precision=bf16")


def test_the_trainer_learns(undisturbed):
    _, losses = undisturbed
    assert losses.isfinite().all() and losses[-3:].mean() < losses[:3].mean()


@pytest.mark.parametrize(
    "override",
    [
        "micro_batch=8",
        "zero.stage=3",
        "loss.exchange=ring",
        "loss.backend=tiled",
        "model.recompute=selective",
        "model.recompute=full",
        "model.norm=torch",
        "model.embedding=dense",
        "model.text_packing=false",
    ],
)
def test_settings_that_change_nothing(torchrun, module_config, undisturbed, tmp_path, override):
    losses = train(torchrun, module_config, tmp_path / "run", "precision=bf16", override)
    torch.testing.assert_close(losses, undisturbed[1], rtol=2e-2, atol=0)


def test_compiled_blocks_train_alike(torchrun, module_config, undisturbed, tmp_path):
    losses = train(torchrun, module_config, tmp_path / "run", "precision=bf16", "model.compile=true")
    torch.testing.assert_close(losses, undisturbed[1], rtol=2e-2, atol=0)


def test_a_resumed_run_continues(torchrun, module_config, tmp_path):
    """Attention's backward pass may add in any order on a GPU, so fp32 losses agree, but not bit for bit."""
    constant = ["optim.schedule=constant", "zero.stage=2"]
    whole = train(torchrun, module_config, tmp_path / "whole", *constant)
    halved = tmp_path / "halved"
    for steps in (6, 12):
        losses = train(torchrun, module_config, halved, f"steps={steps}", *constant)
    torch.testing.assert_close(losses, whole, rtol=1e-3, atol=0)
    moments = TensorFiles(halved / "checkpoints" / "step-00000012", "optimizer")
    assert moments.names() and all(moments.get(name).isfinite().all() for name in moments.names())


def test_a_trained_model_on_both_devices(undisturbed):
    run, _ = undisturbed
    texts = ["a red square on blue ground", "a white square on black ground, number 2"]
    on_gpu, on_cpu = (mc2_hpc.load(run, device=device).encode_text(texts) for device in ("cuda", "cpu"))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-3)


def test_images_decoded_by_dali(torchrun, module_config, undisturbed, tmp_path):
    pytest.importorskip("nvidia.dali", reason="pip install 'mc2_hpc[dali]'")
    losses = train(torchrun, module_config, tmp_path / "run", "precision=bf16", "data.decode=dali")
    torch.testing.assert_close(losses, undisturbed[1], rtol=5e-2, atol=0)
