"""The sigmoid loss in one process: value and gradients, edge cases, cost, and errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mc2_hpc.conversion.peers import import_open_clip
from mc2_hpc.kernels.contrastive import reference_sigmoid_loss, sigmoid_loss
from mc2_hpc.kernels.contrastive.dispatch import SMALLEST_WORKSPACE_BYTES

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOG_10, BIAS = torch.tensor(math.log(10)), torch.tensor(-10.0)
NAMES = ("image", "text", "logit_scale", "logit_bias")


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(1, 90),
    width=st.integers(1, 40),
    log_scale=st.floats(0, math.log(100)),
    bias=st.floats(-30, 10),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_equal_float64(kit, pairs, width, log_scale, bias, dtype, seed):
    image, text = kit.features(pairs, width, dtype, seed=seed)
    of_scalars = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = (image, text, torch.tensor(log_scale, dtype=of_scalars), torch.tensor(bias, dtype=of_scalars))
    found = kit.solve_sigmoid(*inputs, backend="tiled", workspace_bytes=SMALLEST_WORKSPACE_BYTES)
    kit.assert_sigmoid(found, *inputs)


def test_the_reference_is_open_clips(kit):
    image, text = kit.features(30, 12, torch.float64)
    scale, bias = LOG_10.double(), BIAS.double() / 2
    import_open_clip()
    from open_clip.loss import SigLipLoss

    theirs = SigLipLoss()(image, text, scale.exp(), bias)
    torch.testing.assert_close(reference_sigmoid_loss(image, text, scale, bias), theirs, rtol=1e-12, atol=0)


def test_gradcheck(kit):
    inputs = [*kit.features(7, 3, torch.float64), torch.tensor(1.2).double(), torch.tensor(-2.0).double()]
    torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, backend="tiled"), [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 3)])
def test_only_the_wanted_gradients(kit, wanted):
    inputs = [*kit.features(20, 6, torch.float64), LOG_10.double(), BIAS.double()]
    true = kit.solve_sigmoid(*inputs, backend="reference")
    for index in wanted:
        inputs[index].requires_grad_()
    sigmoid_loss(*inputs, backend="tiled").backward()
    for index, name in enumerate(NAMES):
        if index in wanted:
            torch.testing.assert_close(inputs[index].grad, getattr(true, name), rtol=1e-9, atol=1e-12)
        else:
            assert inputs[index].grad is None


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_two_runs_give_the_same_bits(kit, dtype):
    inputs = (*kit.features(150, 24, dtype), LOG_10, BIAS)
    runs = [kit.solve_sigmoid(*inputs, workspace_bytes=1 << 16) for _ in range(2)]
    for name in ("loss", *NAMES):
        assert torch.equal(getattr(runs[0], name), getattr(runs[1], name)), name


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_pairs_of_a_trained_model(kit, backend):
    """Positive pairs far above the others: the loss is tiny and must not be a difference of large sums."""
    image = torch.eye(40, dtype=torch.float32)
    found = kit.solve_sigmoid(image, image, torch.tensor(math.log(100)), torch.tensor(-50.0), backend=backend)
    exact = math.log1p(math.exp(-50)) * 40
    assert float(found.loss) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", range(2))
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_one_bad_feature_makes_the_loss_nan(kit, bad, whose, backend):
    features = kit.features(70, 5, torch.float32)
    features[whose][66, 2] = bad
    options = {"backend": backend, "workspace_bytes": SMALLEST_WORKSPACE_BYTES}
    assert sigmoid_loss(*features, LOG_10, BIAS, **options).isnan()


def test_it_costs_as_many_products_as_the_softmax(kit):
    pairs, width = 192, 64
    inputs = [x.requires_grad_() for x in kit.features(pairs, width, torch.float32)]
    with FlopCounterMode(display=False) as counter:
        loss = sigmoid_loss(*inputs, LOG_10, BIAS, backend="tiled", workspace_bytes=SMALLEST_WORKSPACE_BYTES)
        assert counter.get_total_flops() == 2 * pairs**2 * width
        loss.backward()
    assert counter.get_total_flops() == 8 * pairs**2 * width


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(2), "logit_bias must be a single floating-point number"),
        (torch.zeros((), dtype=torch.int64), "logit_bias must be a single floating-point number"),
        (torch.zeros((), device="meta"), "features and logit_bias must be on the same device"),
    ],
)
def test_bad_biases_get_one_line(bias, message):
    with pytest.raises(ValueError, match=message) as caught:
        sigmoid_loss(torch.ones(5, 8), torch.ones(5, 8), LOG_10, bias)
    assert "\n" not in str(caught.value)
