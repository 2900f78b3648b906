"""Layer norm and quick-GELU in Triton compared with float64: on a GPU if there is one, else in Triton's interpreter,
in the separate process that ``test_triton_interpreter.py`` starts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mc2_hpc.kernels.layer_norm import add_layer_norm, add_norm_linear, layer_norm, reference_layer_norm
from mc2_hpc.kernels.quick_gelu import quick_gelu, quick_gelu_linear, reference_quick_gelu
from mc2_hpc.kernels.split_qkv import split_qkv
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture
from mc2_hpc.precision import Precision

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if GPU else []
DEVICE = "cuda" if GPU else "cpu"
# Half a unit in the last place of a half type; the interpreter rounds bf16 towards zero, a whole one.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 2**-8 if GPU else 2**-7, torch.float16: 2**-11}
SHAPES = [(1, 1), (7, 5), (3, 4, 33), (9, 1000), (5, 1024), (2, 1280)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(found: Tensor, exact: Tensor, error: float, size: float = 1.0) -> None:
    torch.testing.assert_close(found.double(), exact.to(found.device).double(), rtol=error, atol=error * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_equals_float64(shape, dtype):
    x = (2 * normal(*shape) + 3).to(dtype).requires_grad_()
    weight, bias = (normal(shape[-1], seed=seed).requires_grad_() for seed in (1, 2))
    dy = normal(*shape, dtype=dtype, seed=3)
    y = layer_norm(x, weight, bias, 1e-5)
    gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    inputs = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = reference_layer_norm(*inputs, 1e-5)
    exact_gradients = torch.autograd.grad(exact, inputs, dy.double())
    assert y.dtype == dtype and [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    close(y, exact, ERROR[dtype])
    rows = x.numel() // shape[-1]
    # dx is a difference of terms as large as dy * weight / sigma; sums over rows have fp32's error only.
    close(gradients[0], exact_gradients[0], ERROR[dtype], size=3.0)
    for found, true in zip(gradients[1:], exact_gradients[1:], strict=True):
        close(found, true, 1e-5, size=rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_layer_norm_equals_float64(shape, dtype):
    x, added = ((2 * normal(*shape, seed=seed) + 3).to(dtype).requires_grad_() for seed in (0, 4))
    weight, bias = (normal(shape[-1], seed=seed).requires_grad_() for seed in (1, 2))
    dtotal, dy = (normal(*shape, dtype=dtype, seed=seed) for seed in (5, 3))
    both = add_layer_norm(x, added, weight, bias, 1e-5)
    gradients = torch.autograd.grad(both, (x, added, weight, bias), (dtotal, dy))
    total = x.detach() + added.detach()
    assert torch.equal(both[0], total) and both[1].dtype == dtype
    assert torch.equal(both[1], layer_norm(total, weight, bias, 1e-5))
    # The norm is that of the rounded sum, which is kept.
    exact, *parameters = (t.detach().double().requires_grad_() for t in (total, weight, bias))
    true = torch.autograd.grad(reference_layer_norm(exact, *parameters, 1e-5), (exact, *parameters), dy.double())
    close(gradients[0], true[0] + dtotal.double(), ERROR[dtype], size=4.0)
    assert torch.equal(gradients[0], gradients[1])
    for found, expected in zip(gradients[2:], true[1:], strict=True):
        close(found, expected, 1e-5, size=x.numel() // shape[-1])


def test_add_layer_norm_to_a_stream_of_another_type():
    """An fp32 stream stays fp32, as in PyTorch; each input's gradient has its own type."""
    x, added = normal(6, 40).requires_grad_(), normal(6, 40, seed=1).bfloat16().requires_grad_()
    total, y = add_layer_norm(x, added, torch.ones(40, device=DEVICE), torch.zeros(40, device=DEVICE))
    assert torch.equal(total, x.detach() + added.detach()) and y.dtype == torch.float32
    found = torch.autograd.grad(total.sum() + y.square().sum(), (x, added))
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.bfloat16]


def test_add_layer_norm_of_shapes_that_differ():
    parameters = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    with pytest.raises(ValueError, match=r"add_layer_norm of \(2, 8\) and \(1, 8\): the shapes must be equal"):
        add_layer_norm(torch.zeros(2, 8, device=DEVICE), torch.zeros(1, 8, device=DEVICE), *parameters)


LINEAR_SHAPES = [(1, 1), (3, 4, 33), (21, 300)]
"""Of inputs; the second dimension of the last is more than one block of columns, its first more than one of rows."""


def check_linear(function, inputs, exact, dtype):
    """Results and the gradient of every input against float64, and the same bits from a second run."""
    inputs = [None if x is None else x.requires_grad_() for x in inputs]
    present = [x for x in inputs if x is not None]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dys = [normal(*y.shape, dtype=y.dtype, seed=seed) for seed, y in enumerate(outputs, start=20)]
    found = torch.autograd.grad(outputs, present, dys)
    again = function(*inputs)
    again = torch.autograd.grad(again, present, dys)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    true_outputs = exact(*doubles)
    true = torch.autograd.grad(true_outputs, [x for x in doubles if x is not None], [dy.double() for dy in dys])
    for y, true_y in zip(outputs, true_outputs, strict=True):
        assert y.dtype == dtype
        close(y, true_y, 4 * ERROR[dtype], size=float(true_y.detach().abs().max()))
    for x, gradient, true_gradient in zip(present, found, true, strict=True):
        assert gradient.dtype == x.dtype
        close(gradient, true_gradient, 8 * ERROR[dtype], size=float(true_gradient.abs().max()))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LINEAR_SHAPES)
def test_add_norm_linear_equals_float64(shape, dtype, recompute):
    """``added`` contains its bias already, so a reference takes it out of ``added`` and adds it again."""
    width = shape[-1]
    x, added = ((2 * normal(*shape, seed=seed) + 3).to(dtype) for seed in (0, 4))
    norm_weight, norm_bias, added_bias = (normal(width, seed=seed) for seed in (1, 2, 3))
    weight, bias = normal(7, width, seed=6) / width**0.5, normal(7, seed=7)

    def function(x, added, added_bias, norm_weight, norm_bias, weight, bias):
        options = {"added_bias": added_bias, "recompute": recompute}
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            return add_norm_linear(x, added, norm_weight, norm_bias, weight, bias, **options)

    def exact(x, added, added_bias, norm_weight, norm_bias, weight, bias):
        total = x + added + (0 if added_bias is None else added_bias - added_bias.detach())
        rounded = total + (total.detach().to(dtype).double() - total.detach())
        return total, F.linear(reference_layer_norm(rounded, norm_weight, norm_bias), weight, bias)

    inputs = (x, added, added_bias, norm_weight, norm_bias, weight, bias)
    check_linear(function, inputs, exact, dtype)


def test_add_norm_linear_without_an_addition():
    """As in the first block: the sum is the input itself."""
    x, norm_weight, norm_bias = normal(5, 40).requires_grad_(), normal(40, seed=1), normal(40, seed=2)
    weight, bias = normal(7, 40, seed=6), normal(7, seed=7)
    total, out = add_norm_linear(x, None, norm_weight, norm_bias, weight, bias)
    expected = F.linear(layer_norm(x, norm_weight, norm_bias), weight, bias)
    assert torch.equal(total, x) and torch.equal(out, expected)
    (found,) = torch.autograd.grad(total.sum() + out.square().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(x.sum() + expected.square().sum(), x)[0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LINEAR_SHAPES)
def test_quick_gelu_linear_equals_float64(shape, dtype, recompute):
    width = shape[-1]
    x, x_bias = (2 * normal(*shape)).to(dtype), normal(width, seed=3)
    weight, bias = normal(7, width, seed=6) / width**0.5, normal(7, seed=7)

    def function(x, x_bias, weight, bias):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            return quick_gelu_linear(x, weight, bias, x_bias=x_bias, recompute=recompute)

    def exact(x, x_bias, weight, bias):
        x = x + x_bias - x_bias.detach()
        return (F.linear(x * torch.sigmoid(1.702 * x), weight, bias),)

    inputs = (x, x_bias, weight, bias)
    check_linear(function, inputs, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 5, 3, 2, 9), (21, 3, 4, 80)])
def test_split_qkv_equals_float64(shape, dtype):
    """The stacked gradient is exact; the bias gets its sum over rows."""
    qkv, bias = normal(*shape, dtype=dtype).requires_grad_(), normal(3 * shape[-2] * shape[-1]).requires_grad_()
    parts = split_qkv(qkv, bias)
    assert all(torch.equal(part, qkv.select(-3, index)) for index, part in enumerate(parts))
    # As attention's backward pass returns them, heads before rows.
    swapped = [part.transpose(-2, -3).shape for part in parts]
    dys = [normal(*sizes, dtype=dtype, seed=seed).transpose(-2, -3) for seed, sizes in enumerate(swapped)]
    dqkv, dbias = torch.autograd.grad(parts, (qkv, bias), dys)
    stacked = torch.stack(dys, -3)
    assert torch.equal(dqkv, stacked) and dbias.dtype == torch.float32
    close(dbias, stacked.double().flatten(-3).flatten(0, -2).sum(0), 1e-6, size=len(dqkv))


def test_recomputation_changes_no_bit():
    x, added, weight = normal(9, 40), normal(9, 40, seed=1), normal(7, 40, seed=2)
    norm_weight, norm_bias = normal(40, seed=3), normal(40, seed=4)
    found = []
    for recompute in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, added, norm_weight, norm_bias, weight)]
        _, normed = add_norm_linear(*leaves, None, recompute=recompute)
        activated = quick_gelu_linear(leaves[0], leaves[-1], None, recompute=recompute)
        found.append(torch.autograd.grad((normed * activated).square().sum(), leaves))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("trained", [("norm_weight",), ("weight",), ("added_bias",), ("x",), ("x", "bias")])
def test_add_norm_linear_of_frozen_parameters(trained):
    """What is trained has the gradient that it has if all are."""
    tensors = {"x": normal(9, 40), "added": normal(9, 40, seed=1), "added_bias": normal(40, seed=2)}
    tensors |= {"norm_weight": normal(40, seed=3), "norm_bias": normal(40, seed=4)}
    tensors |= {"weight": normal(7, 40, seed=5), "bias": normal(7, seed=6)}

    def gradients(names):
        leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in tensors.items()}
        total, out = add_norm_linear(**leaves, recompute=True)
        return torch.autograd.grad(total.sum() + out.square().sum(), [leaves[name] for name in trained])

    assert all(torch.equal(*pair) for pair in zip(gradients(trained), gradients(tensors), strict=True))


def test_split_qkv_of_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"split_qkv of \(2, 4, 1, 8\): they must be"):
        split_qkv(torch.zeros(2, 4, 1, 8, device=DEVICE))
    with pytest.raises(ValueError, match=r"split_qkv of \(2, 3, 1, 8\) with a bias of \(8,\): they must be"):
        split_qkv(torch.zeros(2, 3, 1, 8, device=DEVICE), torch.zeros(8, device=DEVICE))


@pytest.mark.parametrize("function", [lambda x: layer_norm(x, x[0].detach(), x[1].detach()), quick_gelu])
def test_second_derivatives_are_refused(function):
    """Instead of being zero: the kernels' backward passes have none."""
    x = normal(3, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_layer_norm_of_frozen_parameters():
    """Then only the input's gradient is computed, and it is the same."""
    x, dy = normal(6, 40).requires_grad_(), normal(6, 40, seed=1)
    weight, bias = normal(40, seed=2), normal(40, seed=3)
    (frozen,) = torch.autograd.grad(layer_norm(x, weight, bias), x, dy)
    trained, _ = torch.autograd.grad(layer_norm(x, weight.requires_grad_(), bias), (x, weight), dy)
    assert torch.equal(frozen, trained)


def test_layer_norm_of_a_large_mean():
    """A mean of 1,000 standard deviations: sums of squares would cancel."""
    x = normal(4, 256) + 1000
    weight, bias = torch.ones_like(x[0]), torch.zeros_like(x[0])
    close(layer_norm(x, weight, bias), reference_layer_norm(x, weight, bias), 5e-4)


def test_layer_norm_of_rows_that_are_not_contiguous():
    x, weight, bias = normal(40, 6).t().requires_grad_(), normal(40, seed=2), normal(40, seed=3)
    y = layer_norm(x, weight, bias)
    close(y, reference_layer_norm(x, weight, bias), 2e-6)
    (gradient,) = torch.autograd.grad(y, x, torch.ones(40, 6, device=DEVICE).t())
    exact = x.detach().double().requires_grad_()
    close(gradient, torch.autograd.grad(reference_layer_norm(exact, weight, bias).sum(), exact)[0], 1e-5)


def test_layer_norm_of_no_rows():
    x = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    weight, bias = (torch.ones(8, device=DEVICE, requires_grad=True) for _ in range(2))
    dx, dweight, dbias = torch.autograd.grad(layer_norm(x, weight, bias).sum(), (x, weight, bias))
    assert dx.shape == (0, 8) and not dweight.any() and not dbias.any()


@pytest.mark.parametrize(("x", "parameters"), [((3, 8), (4,)), ((), (1,)), ((2, 8193), (8193,))])
def test_layer_norm_of_shapes_that_do_not_fit(x, parameters):
    with pytest.raises(ValueError, match="need the size of the last dimension, which is from 1 to 8,192"):
        layer_norm(torch.zeros(x), torch.zeros(parameters), torch.zeros(parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (7, 129), (3, 5, 1025)])
def test_quick_gelu_equals_float64(shape, dtype):
    x = (3 * normal(*shape)).to(dtype).requires_grad_()
    dy = normal(*shape, dtype=dtype, seed=3)
    y = quick_gelu(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = x.detach().double().requires_grad_()
    true = reference_quick_gelu(exact)
    assert y.dtype == dx.dtype == dtype
    close(y, true, ERROR[dtype])
    close(dx, torch.autograd.grad(true, exact, dy.double())[0], ERROR[dtype])


def test_quick_gelu_far_from_zero():
    """No overflow: the sigmoid is 0 or 1, and so is the slope."""
    x = torch.tensor([-1e4, -200.0, 200.0, 1e4], device=DEVICE, requires_grad=True)
    y = quick_gelu(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [0.0, 0.0, 200.0, 1e4] and dx.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_two_runs_give_the_same_bits():
    x, weight, bias = normal(50, 300), normal(300, seed=1).requires_grad_(), normal(300, seed=2).requires_grad_()
    runs = [torch.autograd.grad(layer_norm(x, weight, bias).square().sum(), (weight, bias)) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_a_model_with_fused_kernels_trains_like_one_without(precision, recompute):
    vision = VisionArchitecture(image_size=24, patch_size=8, width=32, layers=2, head_width=16, mlp_width=96)
    text = TextArchitecture(vocab_size=50, context_length=16, width=32, heads=2, layers=2, eos_id=2)
    images = normal(3, 3, 24, 24)
    tokens = torch.tensor([[5, 6, 7, 2], [9, 2, 1, 1], [8, 4, 2, 1]], device=DEVICE)
    features, gradients = [], []
    for backend in ("torch", "triton"):
        model = build_clip(ClipArchitecture(vision=vision, text=text, embed_dim=16, quick_gelu=True), seed=0).to(DEVICE)
        model.set_norm(backend, DEVICE)
        model.set_activation(backend, DEVICE)
        model.set_recompute(recompute)
        blocks = [block for transformer in model.transformers() for block in transformer.blocks]
        assert all(block.fuses == (backend == "triton") for block in blocks)
        with precision.autocast(torch.device(DEVICE)):
            pair = model.encode_pairs(images, tokens, [4, 2, 3])
        (pair[0] @ pair[1].T).diagonal().sum().backward()
        features.append(torch.cat(pair))
        gradients.append({name: p.grad for name, p in model.named_parameters() if name != "logit_scale"})
    error = 1e-5 if precision is Precision.FP32 else 0.05
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=error)
    for name, gradient in gradients[0].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=error * max(largest, 0.01), msg=name)
