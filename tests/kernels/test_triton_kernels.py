"""The Triton kernels compared with float64: on a GPU if there is one, else in Triton's interpreter.

The interpreter is chosen when Triton is imported, so without a GPU this module is collected only in a separate process,
which ``test_triton_interpreter.py`` starts.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.kernels.contrastive import (
    Teacher,
    contrastive_loss,
    distilled_contrastive_loss,
    reference_loss,
    sigmoid_loss,
)
from mc2_hpc.kernels.contrastive.dispatch import SMALLEST_WORKSPACE_BYTES
from mc2_hpc.kernels.contrastive.launch import LAUNCHES, SOURCES, Launch, launch_for, source_for
from mc2_hpc.kernels.contrastive.statistics import Statistics
from mc2_hpc.kernels.contrastive.teacher import Distillation
from mc2_hpc.kernels.contrastive.tiles import backward_tiles, forward_tiles

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if GPU else []
DEVICE = "cuda" if GPU else "cpu"

# With small blocks, small problems have many blocks and edges on all sides; on a GPU the table's own run too.
SMALL = {
    (kernel, source): Launch(32, 64, 32, num_warps=4, num_stages=2) for kernel, _ in LAUNCHES for source in SOURCES
}
DTYPES = {
    "descriptor": [torch.bfloat16, torch.float16],
    "pointer": [torch.bfloat16, torch.float16],
    "memory": [torch.bfloat16, torch.float16, torch.float32],
}
CASES = [(source, dtype) for source in SOURCES for dtype in DTYPES[source]]
ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
WIDTHS = st.integers(1, 12).map(lambda n: 8 * n) | st.integers(1, 80)
SHAPES = st.tuples(st.integers(1, 140), st.integers(1, 150), WIDTHS)
"""Rows, columns and width of a tile."""


def tile_features(kit, source, dtype, num_rows, num_columns, width):
    """Images and texts on the device; for descriptors of the next width that they can have."""
    if source == "descriptor":
        width = -(-width // 8) * 8  # the table uses the pointer kernels for other widths
    image, _ = kit.features(num_rows, width, dtype, seed=1)
    text, _ = kit.features(num_columns, width, dtype, seed=2)
    return image.to(DEVICE), text.to(DEVICE)


def tiles_of(
    source, image, num_columns, *, workspace_bytes=SMALLEST_WORKSPACE_BYTES, launches=None, distillation=None, bias=None
):
    """Triton tiles whose kernels use the given source of dot products."""
    from mc2_hpc.kernels.contrastive.triton_distillation import DistilledTritonTiles
    from mc2_hpc.kernels.contrastive.triton_impl import TritonTiles
    from mc2_hpc.kernels.contrastive.triton_sigmoid import SigmoidTritonTiles

    if source == "descriptor" and GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no bulk copy engine")
    if bias is not None:
        return SigmoidTritonTiles(image, num_columns, workspace_bytes, bias, source, launches)
    if distillation is not None:
        return DistilledTritonTiles(image, num_columns, workspace_bytes, distillation, source, launches)
    return TritonTiles(image, num_columns, workspace_bytes, source, launches)


def check_tiles(tiles, image, text, log_scale, diagonal):
    """Compare the statistics and both products with G with float64."""
    scale = torch.tensor(math.exp(log_scale), device=DEVICE)
    rows, cols = (Statistics.empty(len(x), device=scale.device, dtype=scale.dtype) for x in (image, text))
    forward_tiles(tiles, image, text, scale, diagonal, rows, cols)
    images, texts = image.double().cpu(), text.double().cpu()
    S = math.exp(log_scale) * images @ texts.t()
    row_lse, col_lse = torch.logsumexp(S, 1), torch.logsumexp(S, 0)
    size = max(1.0, float(S.abs().max()))
    torch.testing.assert_close(rows.logsumexp().double().cpu(), row_lse, rtol=1e-6, atol=1e-6 * size)
    torch.testing.assert_close(cols.logsumexp().double().cpu(), col_lse, rtol=1e-6, atol=1e-6 * size)

    image_grad, text_grad = (torch.zeros(x.shape, device=DEVICE) for x in (image, text))
    lse = (row_lse.float().to(DEVICE), col_lse.float().to(DEVICE))
    backward_tiles(tiles, image, text, scale, *lse, diagonal, image_grad, text_grad)
    G = torch.exp(S - row_lse[:, None]) + torch.exp(S - col_lse)
    if -len(images) < diagonal < len(texts):
        G.diagonal(diagonal).zero_()
    error = ERROR[image.dtype] * max(1.0, size / 10)
    for grad, want, weights in ((image_grad, G @ texts, G.sum(1)), (text_grad, G.t() @ images, G.sum(0))):
        bound = error * float(weights.max() * max(images.norm(dim=1).max(), texts.norm(dim=1).max()))
        got = grad.double().cpu() / tiles.gradient_scale
        torch.testing.assert_close(got, want, rtol=0, atol=bound + 1e-30)


def check_distilled_tiles(tiles, image, text, log_scale, diagonal):
    """The same with a teacher, whose features follow the student's."""
    scale, distillation = torch.tensor(math.exp(log_scale), device=DEVICE), tiles.distillation
    rows, cols = (tiles.kept.empty(len(x), device=scale.device, dtype=scale.dtype) for x in (image, text))
    forward_tiles(tiles, image, text, scale, diagonal, rows, cols)
    (images, teacher_images), (texts, teacher_texts) = (distillation.parts(x.double().cpu()) for x in (image, text))
    S = math.exp(log_scale) * images @ texts.t()
    U = distillation.scale * teacher_images @ teacher_texts.t()
    size = max(1.0, float(S.abs().max()), float(U.abs().max()))
    both_lse = []
    for kept, s, u in ((rows, S, U), (cols, S.t(), U.t())):
        lse = torch.stack((s.logsumexp(1), u.logsumexp(1)), 1)
        divergence = (u.softmax(1) * (u.log_softmax(1) - s.log_softmax(1))).sum(1)
        torch.testing.assert_close(kept.logsumexp().double().cpu(), lse, rtol=1e-6, atol=1e-6 * size)
        torch.testing.assert_close(kept.divergence().double().cpu(), divergence, rtol=1e-5, atol=3e-6 * size)
        both_lse.append(lse)

    image_grad, text_grad = (torch.zeros(len(x), distillation.width, device=DEVICE) for x in (image, text))
    lse = [x.float().to(DEVICE) for x in both_lse]
    backward_tiles(tiles, image, text, scale, *lse, diagonal, image_grad, text_grad)
    G = torch.zeros_like(S)
    for logits, column, factor in ((S, 0, 1.0), (U, 1, -distillation.share)):
        rows_of, cols_of = (x[:, column] for x in both_lse)
        G += factor * (torch.exp(logits - rows_of[:, None]) + torch.exp(logits - cols_of))
    if -len(images) < diagonal < len(texts):
        G.diagonal(diagonal).zero_()
    error = ERROR[image.dtype] * max(1.0, size / 10)
    for grad, want, weights in (
        (image_grad, G @ texts, 1 + G.abs().sum(1)),
        (text_grad, G.t() @ images, 1 + G.abs().sum(0)),
    ):
        bound = error * float(weights.max() * max(images.norm(dim=1).max(), texts.norm(dim=1).max()))
        torch.testing.assert_close(grad.double().cpu() / tiles.gradient_scale, want, rtol=0, atol=bound)


def check_sigmoid_tiles(tiles, image, text, log_scale, diagonal):
    """The same of the sigmoid loss."""
    scale = torch.tensor(math.exp(log_scale), device=DEVICE)
    options = {"device": scale.device, "dtype": scale.dtype}
    rows, cols = tiles.kept.empty(len(image), **options), tiles.kept_of_columns.empty(len(text), **options)
    forward_tiles(tiles, image, text, scale, diagonal, rows, cols)
    images, texts = image.double().cpu(), text.double().cpu()
    S = math.exp(log_scale) * images @ texts.t() + tiles.bias.double().cpu()
    others = torch.ones_like(S)
    if -len(images) < diagonal < len(texts):
        others.diagonal(diagonal).zero_()
    G = S.sigmoid() * others
    sums = torch.stack(((-torch.nn.functional.logsigmoid(-S) * others).sum(1), G.sum(1)), 1)
    size = max(1.0, float(S.abs().max()))
    torch.testing.assert_close(rows.total.double().cpu(), sums, rtol=1e-6 * size, atol=1e-30)

    image_grad, text_grad = (torch.zeros(x.shape, device=DEVICE) for x in (image, text))
    none = [torch.empty(len(x), 0, device=DEVICE) for x in (image, text)]
    backward_tiles(tiles, image, text, scale, *none, diagonal, image_grad, text_grad)
    error = ERROR[image.dtype] * max(1.0, size / 10)
    for grad, want, weights in ((image_grad, G @ texts, G.sum(1)), (text_grad, G.t() @ images, G.sum(0))):
        bound = error * float(weights.max() * max(images.norm(dim=1).max(), texts.norm(dim=1).max()))
        # fp16 holds G, times 2^14, only down to its smallest subnormal number.
        torch.testing.assert_close(grad.double().cpu() / tiles.gradient_scale, want, rtol=0, atol=bound + 1e-9)


@pytest.mark.parametrize(("source", "dtype"), CASES)
@settings(max_examples=10, deadline=None)
@given(
    shape=SHAPES,
    log_scale=st.floats(0, math.log(100)),
    diagonal=st.integers(-150, 150),
)
def test_tiles_equal_float64(kit, source, dtype, shape, log_scale, diagonal):
    image, text = tile_features(kit, source, dtype, *shape)
    check_tiles(tiles_of(source, image, len(text), launches=SMALL), image, text, log_scale, diagonal)


@pytest.mark.parametrize(("source", "dtype"), CASES)
def test_tiles_with_the_launch_parameters_of_the_table(kit, source, dtype):
    image, text = (x.to(DEVICE) for x in kit.features(259, 72, dtype))
    check_tiles(tiles_of(source, image, 259, workspace_bytes=1 << 20), image, text, math.log(50), 0)


@pytest.mark.parametrize(("source", "dtype"), CASES)
@settings(max_examples=8, deadline=None)
@given(
    shape=SHAPES,
    log_scale=st.floats(0, math.log(100)),
    bias=st.floats(-20, 10),
    diagonal=st.integers(-150, 150),
)
def test_tiles_of_the_sigmoid_loss_equal_float64(kit, source, dtype, shape, log_scale, bias, diagonal):
    image, text = tile_features(kit, source, dtype, *shape)
    tiles = tiles_of(source, image, len(text), launches=SMALL, bias=torch.tensor(bias, device=DEVICE))
    check_sigmoid_tiles(tiles, image, text, log_scale, diagonal)


@pytest.mark.parametrize(("source", "dtype"), CASES)
def test_tiles_of_the_sigmoid_loss_with_the_launch_parameters_of_the_table(kit, source, dtype):
    image, text = (x.to(DEVICE) for x in kit.features(259, 72, dtype))
    tiles = tiles_of(source, image, 259, workspace_bytes=1 << 20, bias=torch.tensor(-9.0, device=DEVICE))
    check_sigmoid_tiles(tiles, image, text, math.log(50), 0)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("pairs", [1, 63, 200])
def test_sigmoid_loss_and_gradients_equal_float64(kit, pairs, dtype):
    image, text = (x.to(DEVICE) for x in kit.features(pairs, 40, dtype))
    inputs = (image, text, torch.tensor(math.log(30), device=DEVICE), torch.tensor(-10.0, device=DEVICE))
    options = {"backend": "triton", "workspace_bytes": SMALLEST_WORKSPACE_BYTES}
    found, again = (kit.solve_sigmoid(*inputs, **options) for _ in "ab")
    kit.assert_sigmoid(found, *inputs, slack=2)
    for name in ("loss", "image", "text", "logit_scale", "logit_bias"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy notices the NaN
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_feature_makes_the_sigmoid_loss_nan(kit, bad):
    image, text = (x.to(DEVICE) for x in kit.features(70, 16, torch.bfloat16))
    text[66, 2] = bad
    scalars = (torch.tensor(2.0, device=DEVICE), torch.tensor(-10.0, device=DEVICE))
    assert sigmoid_loss(image, text, *scalars, backend="triton").isnan()


def with_teacher(kit, rows, width, teacher_width, dtype, *, seed):
    """(rows, width + teacher_width) images and texts of both models on the device."""
    both = zip(
        kit.features(rows, width, dtype, seed=seed),
        kit.features(rows, teacher_width, dtype, seed=seed + 9),
        strict=True,
    )
    return [torch.cat(parts, 1).to(DEVICE) for parts in both]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # exponentials outside the tile, which are not stored
@pytest.mark.parametrize(("source", "dtype"), CASES)
@settings(max_examples=8, deadline=None)
@given(
    num_rows=st.integers(1, 140),
    num_columns=st.integers(1, 150),
    widths=st.tuples(WIDTHS, WIDTHS),
    log_scale=st.floats(0, math.log(100)),
    diagonal=st.integers(-150, 150),
)
def test_tiles_with_a_teacher_equal_float64(kit, source, dtype, num_rows, num_columns, widths, log_scale, diagonal):
    if source == "descriptor":
        widths = [-(-width // 8) * 8 for width in widths]
    image, _ = with_teacher(kit, num_rows, *widths, dtype, seed=1)
    _, text = with_teacher(kit, num_columns, *widths, dtype, seed=2)
    distillation = Distillation(width=widths[0], scale=60.0, share=0.4)
    tiles = tiles_of(source, image, num_columns, launches=SMALL, distillation=distillation)
    check_distilled_tiles(tiles, image, text, log_scale, diagonal)


@pytest.mark.parametrize(("source", "dtype"), CASES)
def test_tiles_with_a_teacher_and_the_launch_parameters_of_the_table(kit, source, dtype):
    image, text = with_teacher(kit, 259, 72, 136, dtype, seed=0)
    distillation = Distillation(width=72, scale=100.0, share=0.5)
    tiles = tiles_of(source, image, 259, workspace_bytes=1 << 20, distillation=distillation)
    check_distilled_tiles(tiles, image, text, math.log(50), 0)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("pairs", [1, 63, 200])
def test_distilled_loss_and_gradients_equal_float64(kit, pairs, dtype):
    image, text = (x.to(DEVICE) for x in kit.features(pairs, 40, dtype))
    teacher = Teacher(*(x.to(DEVICE) for x in kit.features(pairs, 56, dtype, seed=5)), weight=0.5)
    scale = torch.tensor(math.log(30), device=DEVICE)
    options = {"backend": "triton", "workspace_bytes": SMALLEST_WORKSPACE_BYTES}
    found, again = (kit.solve_distilled(image, text, scale, teacher, **options) for _ in "ab")
    kit.assert_distilled(found, image, text, scale, teacher, slack=2)
    for name in ("loss", "image", "text", "logit_scale"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy notices the NaN
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("whose", range(4))
def test_one_bad_feature_of_either_model_makes_the_loss_nan(kit, dtype, whose):
    features = [x.to(DEVICE) for seed in (0, 1) for x in kit.features(70, 16, dtype, seed=seed)]
    features[whose][66, 2] = math.inf
    scale = torch.tensor(2.0, device=DEVICE)
    assert distilled_contrastive_loss(*features[:2], scale, Teacher(*features[2:]), backend="triton")[0].isnan()


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("pairs", [1, 63, 200])
def test_loss_and_gradients_equal_float64(kit, pairs, dtype):
    image, text = (x.to(DEVICE) for x in kit.features(pairs, 40, dtype))
    scale = torch.tensor(math.log(30), device=DEVICE)
    found = kit.solve(contrastive_loss, image, text, scale, backend="triton", workspace_bytes=SMALLEST_WORKSPACE_BYTES)
    kit.assert_exact(found, image, text, scale, slack=2)


@pytest.mark.parametrize("dtype", ERROR)
def test_two_runs_give_the_same_bits(kit, dtype):
    image, text = (x.to(DEVICE) for x in kit.features(150, 32, dtype))
    runs = [kit.solve(contrastive_loss, image, text, torch.tensor(3.0, device=DEVICE), backend="triton") for _ in "ab"]
    for name in ("loss", "image", "text", "logit_scale"):
        assert torch.equal(getattr(runs[0], name), getattr(runs[1], name)), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy notices the NaN
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_feature_makes_the_loss_nan(kit, dtype, bad):
    image, text = (x.to(DEVICE) for x in kit.features(70, 16, dtype))
    text[66, 2] = bad
    assert contrastive_loss(image, text, torch.tensor(2.0, device=DEVICE), backend="triton").isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_logits_stay_finite(kit, dtype):
    image, text = (x.to(DEVICE) for x in kit.features(70, 16, dtype, norm=30.0))
    scale = torch.tensor(math.log(100), device=DEVICE)
    found = kit.solve(contrastive_loss, image, text, scale, backend="triton")
    true = kit.solve(reference_loss, image.cpu().double(), text.cpu().double(), scale.cpu().double())
    torch.testing.assert_close(found.loss.cpu().double(), true.loss, rtol=1e-5, atol=0)
    assert found.image.isfinite().all() and found.text.isfinite().all()


def test_fp64_is_sent_to_another_backend(kit):
    image, text = (x.to(DEVICE) for x in kit.features(4, 4, torch.float64))
    with pytest.raises(ValueError, match="not fp64: use backend='tiled'"):
        contrastive_loss(image, text, torch.tensor(0.0, device=DEVICE), backend="triton")


def test_the_table_has_an_entry_for_every_chip():
    assert source_for(False, 90, 2048, 1 << 20) == "descriptor"
    assert source_for(False, 90, 2050, 1 << 20) == "pointer"
    assert source_for(False, 90, 2048, (1 << 20) + 2) == "pointer"
    assert source_for(False, 86, 2048, 1 << 20) == "pointer"
    assert source_for(True, 90, 2048, 1 << 20) == "memory"
    for kernel, source in LAUNCHES:
        for capability in (75, 80, 86, 89, 90, 100, 103, 120):
            assert isinstance(launch_for(kernel, source, capability), Launch)
    assert launch_for("gradient", "descriptor", 90) is LAUNCHES["gradient", "descriptor"][90]
    assert launch_for("gradient", "pointer", 75) is LAUNCHES["gradient", "pointer"][80]
