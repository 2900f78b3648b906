"""The tables of backends for layer norm and quick-GELU. ``tests/kernels/test_triton_fused.py`` has the kernels."""

import logging
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mc2_hpc.config import ModelConfig
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.fused import LayerNorm, QuickGELU, resolve_activation, resolve_norm, torch_norm, torch_quick_gelu
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture

VISION = VisionArchitecture(image_size=16, patch_size=8, width=16, layers=1, head_width=8, mlp_width=32)
TEXT = TextArchitecture(vocab_size=20, context_length=8, width=16, heads=2, layers=1, eos_id=2)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_auto_is_torch_on_a_cpu_and_says_so(caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    caplog.set_level(logging.INFO)
    assert resolve_norm("auto", "cpu") is torch_norm
    assert "norm: torch (auto: tensors are on cpu, which triton does not compile for" in caplog.text


@pytest.mark.parametrize(("compiled", "expected"), [(False, "triton"), (True, "torch")])
def test_auto_on_a_gpu(caplog, monkeypatch, compiled, expected):
    monkeypatch.setattr("mc2_hpc.models.fused.triton_obstacle", lambda device: None)
    caplog.set_level(logging.INFO)
    assert (resolve_norm("auto", "cuda", compiled=compiled) is torch_norm) == (expected == "torch")
    assert (resolve_activation("auto", "cuda", compiled=compiled) is torch_quick_gelu) == (expected == "torch")
    assert f"norm: {expected} (auto: " in caplog.text and f"activation: {expected} (auto: " in caplog.text


@pytest.mark.parametrize("resolve", [resolve_norm, resolve_activation])
def test_a_backend_that_cannot_run_is_an_error(monkeypatch, resolve):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    key = resolve.__name__.removeprefix("resolve_")
    with pytest.raises(UserError, match=f"^model.{key}=triton cannot run: .*, or set model.{key}=torch$"):
        resolve("triton", "cpu")
    with pytest.raises(UserError, match=f"^model.{key}='cudnn': choose one of auto, torch, triton"):
        resolve("cudnn", "cpu")


def test_without_apex_the_error_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"^model.norm=apex: NVIDIA's apex does not load .* APEX_CUDA_EXT=1"):
        resolve_norm("apex", "cuda")


SHAPE = (6, 8)


class _Traffic(TorchDispatchMode):
    """Bytes of the inputs and outputs of every operator, per value of tensors of the shape; views and parameters are
    free."""

    def __init__(self) -> None:
        super().__init__()
        self.per_value = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function is not torch.ops.aten.empty_like.default:
            self.add(args, kwargs, result)
        return result

    def add(self, *values) -> None:
        tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
        self.per_value += sum(tensor.element_size() for tensor in tensors if tensor.shape == SHAPE)

    def kernel(self) -> dict[tuple[int], Callable[..., None]]:
        """In place of a Triton kernel, for any grid: it computes nothing, and its arguments count."""
        return defaultdict(lambda: lambda *arguments, **_options: self.add(arguments))


def measured(function: Callable[[torch.Tensor], Any], traffic: _Traffic) -> tuple[int, int, int]:
    """Bytes per value of a bf16 input that the forward pass moves, that backward moves, and that are kept in between;
    parameters are frozen."""
    x, dy = normal(*SHAPE).bfloat16().requires_grad_(), normal(*SHAPE, seed=3).bfloat16()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == SHAPE:
            kept[tensor.data_ptr()] = tensor.element_size()
        return tensor

    with traffic, saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(x)
    forward, traffic.per_value = traffic.per_value, 0
    with traffic:
        outputs = y if isinstance(y, tuple) else (y,)
        torch.autograd.grad(outputs, x, (dy,) * len(outputs))
    return forward, traffic.per_value, sum(kept.values())


WEIGHT, BIAS, EPS = normal(8, seed=1), normal(8, seed=2), 1e-5
ADDED = normal(*SHAPE, seed=4).bfloat16()


@pytest.mark.parametrize(
    ("label", "package", "eager", "fused"),
    [
        (
            "layer norm",
            "layer_norm",
            # CUDA's autocast casts a norm's input to fp32, the CPU's does not.
            lambda x: torch_norm(x.float(), WEIGHT, BIAS, EPS).to(x.dtype),
            lambda kernels, x: kernels.TritonLayerNorm.apply(x, WEIGHT, BIAS, EPS),
        ),
        ("quick-GELU", "quick_gelu", torch_quick_gelu, lambda kernels, x: kernels.TritonQuickGELU.apply(x)),
        (
            "addition and layer norm",
            "layer_norm",
            lambda x: (total := x + ADDED, torch_norm(total.float(), WEIGHT, BIAS, EPS).to(x.dtype)),
            lambda kernels, x: kernels.TritonAddLayerNorm.apply(x, ADDED, WEIGHT, BIAS, EPS),
        ),
    ],
)
def test_what_is_moved_and_kept_is_what_the_docs_say(label, package, eager, fused, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {label} \| (\d+) \+ (\d+) \| (\d) \+ (\d) \| (\d) bytes \| (\d) bytes \|$", page, re.M)
    *moved, kept, fused_kept = map(int, row)
    assert measured(eager, _Traffic()) == (*moved[:2], kept)
    kernels = pytest.importorskip(f"mc2_hpc.kernels.{package}.triton_impl", reason="the package triton is missing")
    traffic = _Traffic()
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, traffic.kernel())
    assert measured(lambda x: fused(kernels, x), traffic) == (*moved[2:], fused_kept)


@pytest.fixture
def apex(monkeypatch):
    """NVIDIA's function with its own signature, in PyTorch: the result has the parameters' type."""
    module, calls = ModuleType("apex.normalization.fused_layer_norm"), []

    def mixed_dtype_fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
        if torch.is_autocast_enabled("cpu"):  # NVIDIA's casts all its arguments then
            input, weight, bias = (t.to(torch.get_autocast_dtype("cpu")) for t in (input, weight, bias))
        calls.append((input.dtype, weight.dtype, eps))
        return F.layer_norm(input.to(weight.dtype), normalized_shape, weight, bias, eps)

    module.mixed_dtype_fused_layer_norm_affine = mixed_dtype_fused_layer_norm_affine  # type: ignore[attr-defined]
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_apex_gets_fp32_parameters_and_its_result_the_type_of_the_input(apex):
    norm = resolve_norm("apex", "cpu")
    x, weight, bias = normal(3, 8).bfloat16(), normal(8, seed=1), normal(8, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x, weight, bias, 1e-5)
    assert y.dtype == torch.bfloat16 and apex == [(torch.bfloat16, torch.float32, 1e-5)]
    assert torch.equal(y, F.layer_norm(x.float(), (8,), weight, bias, 1e-5).bfloat16())


def test_a_config_sets_every_layer(apex):
    model = build_clip(ClipArchitecture(vision=VISION, text=TEXT, embed_dim=8, quick_gelu=True), seed=0)
    model.set_backends(ModelConfig(norm="apex", recompute="full"), "cpu")
    model.encode_pairs(normal(2, 3, 16, 16), torch.tensor([[3, 2], [4, 2]]))
    num_norms = sum(isinstance(layer, LayerNorm) for layer in model.modules())
    # In training each block is computed again in backward, here there is none.
    assert num_norms == 2 * 2 + 3 and len(apex) == num_norms


def test_a_model_with_gelu_needs_no_quick_gelu():
    model = build_clip(ClipArchitecture(vision=VISION, text=TEXT, embed_dim=8, quick_gelu=False), seed=0)
    model.set_activation("triton", "cpu")  # not even its backend is loaded
    assert not any(isinstance(layer, QuickGELU) for layer in model.modules())


@pytest.mark.parametrize("key, kernel", [("norm", "triton"), ("norm", "apex"), ("activation", "triton")])
def test_fused_kernels_do_not_go_into_compiled_blocks(key, kernel):
    with pytest.raises(
        UserError, match=f"model.{key}={kernel}: torch.compile fuses torch's own; set model.{key}=torch"
    ):
        ModelConfig(compile=True, **{key: kernel})
    assert getattr(ModelConfig(compile=True, **{key: "torch"}), key) == "torch"
