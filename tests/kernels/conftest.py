"""Inputs and float64 references for all kernel tests."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mc2_hpc.kernels.contrastive import (
    Teacher,
    distilled_contrastive_loss,
    reference_loss,
    reference_sigmoid_loss,
    reference_terms,
    sigmoid_loss,
)

# Triton chooses between compiling and interpreting at import: see test_triton_interpreter.py.
collect_ignore = (
    []
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    else ["test_triton_kernels.py", "test_triton_fused.py"]
)

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Largest relative error by dtype of the features; gradients of half-precision features are rounded to half."""


@dataclass(frozen=True)
class Solution:
    """A loss and its gradients."""

    loss: Tensor
    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    """Of the sigmoid loss."""


def features(pairs: int, width: int, dtype: torch.dtype, *, seed: int = 0, norm: float = 1.0) -> tuple[Tensor, Tensor]:
    """Random image and text features; matching pairs are similar."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(pairs, width, generator=generator, dtype=torch.float64)
    text = torch.randn(pairs, width, generator=generator, dtype=torch.float64) + image
    return tuple((norm * x / x.norm(dim=1, keepdim=True)).to(dtype) for x in (image, text))


def solve(loss: Callable[..., Tensor], image: Tensor, text: Tensor, logit_scale: Tensor, **options) -> Solution:
    """Value and gradients of a loss, computed on copies of the inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in (image, text, logit_scale)]
    value = loss(*inputs, **options)
    return Solution(value.detach(), *torch.autograd.grad(value, inputs))


def solve_distilled(image: Tensor, text: Tensor, logit_scale: Tensor, teacher: Teacher, **options) -> Solution:
    """The same with a teacher."""

    def loss(*inputs: Tensor) -> Tensor:
        return distilled_contrastive_loss(*inputs, teacher, **options)[0]

    return solve(loss, image, text, logit_scale)


def solve_sigmoid(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, loss=sigmoid_loss, **options
) -> Solution:
    """The same of the sigmoid loss."""
    inputs = [x.detach().clone().requires_grad_() for x in (image, text, logit_scale, logit_bias)]
    value = loss(*inputs, **options)
    return Solution(value.detach(), *torch.autograd.grad(value, inputs))


def assert_sigmoid(
    found: Solution, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, slack: float = 1.0
) -> None:
    """Value and all gradients of the sigmoid loss equal the dense float64 reference's.

    Errors are measured relative to the size of one image's contribution: all its terms, the positive pair's included.
    """
    exact = [x.detach().cpu().double() for x in (image, text, logit_scale, logit_bias)]
    true = solve_sigmoid(*exact, loss=reference_sigmoid_loss)
    image, text, logit_scale, logit_bias = exact
    S = logit_scale.exp() * image @ text.t() + logit_bias
    G, logit = S.sigmoid().fill_diagonal_(1), float(S.abs().max())
    norms = [float(x.norm(dim=1).max()) for x in (image, text)]
    pair = float(logit_scale.exp()) / len(image)
    tolerance = TOLERANCE[found.image.dtype] * slack * max(1.0, logit / 10)
    for name, size in {
        "loss": float(true.loss),
        "image": pair * norms[1] * float(G.sum(1).max()),
        "text": pair * norms[0] * float(G.sum(0).max()),
        "logit_scale": logit * float(G.sum(1).mean()),
        "logit_bias": float(G.sum(1).mean()),
    }.items():
        got, want = getattr(found, name).cpu().double(), getattr(true, name)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}")


def assert_exact(found: Solution, image: Tensor, text: Tensor, logit_scale: Tensor, *, slack: float = 1.0) -> None:
    """Value and all gradients equal the dense float64 reference's, to the tolerance of the features' dtype.

    Errors are measured relative to the size of one pair's contribution, because gradients are differences of such terms
    and may cancel. fp32 logits of size L, and exponents computed from them, are off by about 1e-7 L.
    """
    exact = [x.detach().cpu().double() for x in (image, text, logit_scale)]
    _assert_close(found, solve(reference_loss, *exact), exact, TOLERANCE[image.dtype] * slack)


def assert_distilled(
    found: Solution, image: Tensor, text: Tensor, logit_scale: Tensor, teacher: Teacher, *, slack: float = 1.0
) -> None:
    """The same with a teacher, whose logits may be the largest."""
    exact = [x.detach().cpu().double() for x in (image, text, logit_scale)]
    features = [x.cpu().double() for x in (teacher.image_features, teacher.text_features)]

    def loss(*inputs: Tensor) -> Tensor:
        contrastive, divergence = reference_terms(*inputs, *features, teacher.scale)
        return contrastive + teacher.weight * divergence

    logit = teacher.scale * math.prod(float(x.norm(dim=1).max()) for x in features)
    tolerance = TOLERANCE[image.dtype] * slack * (1 + teacher.weight)
    _assert_close(found, solve(loss, *exact), exact, tolerance, logit)


def _assert_close(
    found: Solution, true: Solution, inputs: list[Tensor], tolerance: float, teacher_logit: float = 0.0
) -> None:
    image, text, logit_scale = inputs
    scale, norms = logit_scale.exp(), [float(x.norm(dim=1).max()) for x in (image, text)]
    logit = float(scale) * norms[0] * norms[1]
    tolerance *= max(1.0, max(logit, teacher_logit) / 10)
    pair = float(scale) / len(image)
    for name, size in {
        "loss": min(max(logit, teacher_logit), 1 + float(true.loss)),
        "image": pair * norms[1],
        "text": pair * norms[0],
        "logit_scale": logit,
    }.items():
        got, want = getattr(found, name).cpu().double(), getattr(true, name)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers above, for test modules, which cannot import each other."""
    return SimpleNamespace(
        Solution=Solution,
        features=features,
        solve=solve,
        solve_distilled=solve_distilled,
        solve_sigmoid=solve_sigmoid,
        assert_exact=assert_exact,
        assert_sigmoid=assert_sigmoid,
        assert_distilled=assert_distilled,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Other tests share the cores, and small products are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
