"""The contrastive loss in one process: value and gradients, edge cases, memory, and errors."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mc2_hpc.kernels.contrastive import BACKENDS, contrastive_loss, reference_loss
from mc2_hpc.kernels.contrastive.dispatch import SMALLEST_WORKSPACE_BYTES
from mc2_hpc.kernels.contrastive.statistics import Statistics
from mc2_hpc.kernels.contrastive.tiles import blocks
from mc2_hpc.kernels.contrastive.torch_tiles import tile_shape

LOG_100 = math.log(100)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(1, 90),
    width=st.integers(1, 40),
    log_scale=st.floats(0, LOG_100),
    log_norm=st.floats(-3, 1.5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_equal_float64(kit, pairs, width, log_scale, log_norm, dtype, seed):
    image, text = kit.features(pairs, width, dtype, seed=seed, norm=10**log_norm)
    scale = torch.tensor(log_scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    found = kit.solve(contrastive_loss, image, text, scale, backend="tiled", workspace_bytes=SMALLEST_WORKSPACE_BYTES)
    kit.assert_exact(found, image, text, scale)


@pytest.mark.parametrize("width", [512, 640, 768, 1024, 1280])
def test_widths_of_models_with_odd_batches(kit, width):
    image, text = kit.features(131, width, torch.float32)
    scale = torch.tensor(LOG_100)
    found = kit.solve(contrastive_loss, image, text, scale, workspace_bytes=SMALLEST_WORKSPACE_BYTES)
    kit.assert_exact(found, image, text, scale)


def test_gradcheck():
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *inputs: contrastive_loss(*inputs, backend="tiled"), (image, text, scale))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_two_runs_give_the_same_bits(kit, dtype):
    image, text = kit.features(150, 24, dtype)
    scale = torch.tensor(3.0)
    runs = [kit.solve(contrastive_loss, image, text, scale, workspace_bytes=1 << 16) for _ in range(2)]
    for name in ("loss", "image", "text", "logit_scale"):
        assert torch.equal(getattr(runs[0], name), getattr(runs[1], name)), name


def test_logits_of_a_hundred_thousand_neither_overflow_nor_underflow(kit):
    image, text = kit.features(40, 16, torch.float32, norm=30.0)
    scale = torch.tensor(LOG_100)
    found = kit.solve(contrastive_loss, image, text, scale, workspace_bytes=SMALLEST_WORKSPACE_BYTES)
    true = kit.solve(reference_loss, image.double(), text.double(), scale.double())
    assert true.loss > 100
    torch.testing.assert_close(found.loss.double(), true.loss, rtol=1e-5, atol=0)
    assert found.image.isfinite().all() and found.text.isfinite().all() and found.logit_scale.isfinite()


def test_a_row_far_below_all_others_keeps_its_precision(kit):
    """With a maximum shared with other rows, exp of its logits would be zero."""
    image, text = kit.features(64, 8, torch.float32)
    image[0] *= -100
    scale = torch.tensor(math.log(10))
    found = kit.solve(contrastive_loss, image, text, scale)
    kit.assert_exact(found, image, text, scale)
    assert found.image[0].abs().max() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tower", [0, 1])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_one_bad_feature_makes_the_loss_nan(kit, bad, tower, backend):
    pair = kit.features(70, 5, torch.float32)
    pair[tower][66, 2] = bad
    loss = contrastive_loss(*pair, torch.tensor(2.0), backend=backend, workspace_bytes=SMALLEST_WORKSPACE_BYTES)
    assert loss.isnan()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_the_wanted_gradients(kit, wanted):
    inputs = [*kit.features(20, 6, torch.float64), torch.tensor(1.0, dtype=torch.float64)]
    true = kit.solve(reference_loss, *inputs)
    for index in wanted:
        inputs[index].requires_grad_()
    contrastive_loss(*inputs, backend="tiled").backward()
    for index, name in enumerate(("image", "text", "logit_scale")):
        if index in wanted:
            torch.testing.assert_close(inputs[index].grad, getattr(true, name), rtol=1e-9, atol=1e-12)
        else:
            assert inputs[index].grad is None


def test_gradients_follow_the_upstream_gradient(kit):
    image, text = kit.features(20, 6, torch.float64)
    scale = torch.tensor(1.0, dtype=torch.float64)
    once = kit.solve(contrastive_loss, image, text, scale)
    thrice = kit.solve(lambda *inputs: 3 * contrastive_loss(*inputs), image, text, scale)
    torch.testing.assert_close(thrice.text, 3 * once.text)
    torch.testing.assert_close(thrice.logit_scale, 3 * once.logit_scale)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_autocast_changes_nothing(kit, backend):
    image, text = kit.features(50, 32, torch.float32)
    scale = torch.tensor(4.0)

    def under_autocast(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return contrastive_loss(*inputs, backend=backend)

    plain = kit.solve(contrastive_loss, image, text, scale, backend=backend)
    mixed = kit.solve(under_autocast, image, text, scale)
    assert torch.equal(plain.loss, mixed.loss) and torch.equal(plain.image, mixed.image)


def test_views_give_what_their_copies_give(kit):
    image, text = kit.features(30, 8, torch.float32)
    views = [torch.stack((x, x), dim=-1)[..., 0] for x in (image, text)]
    assert not views[0].is_contiguous()
    assert torch.equal(contrastive_loss(*views, torch.tensor(2.0)), contrastive_loss(image, text, torch.tensor(2.0)))


def test_forward_and_backward_take_eight_flops_for_each_pair_and_feature(kit):
    pairs, width = 192, 64
    inputs = [x.requires_grad_() for x in kit.features(pairs, width, torch.float32)]
    with FlopCounterMode(display=False) as counter:
        loss = contrastive_loss(*inputs, torch.tensor(2.0), backend="tiled", workspace_bytes=SMALLEST_WORKSPACE_BYTES)
        assert counter.get_total_flops() == 2 * pairs**2 * width
        loss.backward()
    assert counter.get_total_flops() == 8 * pairs**2 * width


PEAK_MEMORY = """
import sys, torch
from pathlib import Path
from mc2_hpc.kernels.contrastive import Teacher, contrastive_loss, distilled_contrastive_loss

def loss(image, text, teacher):
    options = {"backend": "tiled", "workspace_bytes": 4 << 20}
    if sys.argv[1] == "distilled":
        return distilled_contrastive_loss(image, text, torch.tensor(2.0), teacher, **options)[0]
    return contrastive_loss(image, text, torch.tensor(2.0), **options)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024

torch.set_num_threads(1)
for pairs in (64, 4096, 8192):
    image, text = (torch.randn(pairs, 32).div_(5).requires_grad_() for _ in range(2))
    teacher = Teacher(*(torch.randn(pairs, 32).div_(5) for _ in range(2)), scale=5.0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loss(image, text, teacher).backward()
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from /proc")
@pytest.mark.parametrize("kind", ["plain", "distilled"])
def test_peak_memory_grows_with_the_batch_and_not_its_square(kind):
    result = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, kind], capture_output=True, text=True, timeout=120, check=True
    )
    _, small, large = map(int, result.stdout.split())
    features = 8192 * 32 * 4
    # One matrix of logits would be 64 MB for the small batch and 256 MB for the large one.
    assert large < (4 << 20) + 16 * features
    assert large - small < 12 * features


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(0, 5000), columns=st.integers(0, 5000), elements=st.integers(64, 1 << 22))
def test_tiles_fit_their_workspace_and_cover_the_problem(rows, columns, elements):
    height, width = tile_shape(rows, columns, elements)
    assert 1 <= height <= max(rows, 1) and 1 <= width <= max(columns, 1)
    assert height * width <= elements
    covered = [index for part in blocks(rows, height) for index in range(part.start, part.stop)]
    assert covered == list(range(rows))


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
def test_merged_statistics_equal_logsumexp_of_the_whole(logits, cuts):
    series = torch.tensor(logits, dtype=torch.float64)
    running = Statistics.empty(1, device=series.device, dtype=series.dtype)
    for part in torch.tensor_split(series, sorted(cuts)):
        if len(part):
            running.merge_(part.max()[None], torch.exp(part - part.max()).sum()[None])
    torch.testing.assert_close(running.logsumexp()[0], torch.logsumexp(series, 0), rtol=1e-12, atol=1e-12)


def test_mean_loss_of_unrelated_pairs_is_the_logarithm_of_their_number():
    image, text = torch.eye(64)[:32], torch.eye(64)[32:]
    torch.testing.assert_close(contrastive_loss(image, text, torch.tensor(LOG_100)), torch.tensor(math.log(32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_features": torch.ones(4, 3)}, r"\(pairs, width\).*\(5, 3\) and \(4, 3\)"),
        ({"text_features": torch.ones(5, 3, dtype=torch.float16)}, "bf16, fp16 or fp32"),
        ({"image_features": torch.ones(5, 3).int(), "text_features": torch.ones(5, 3).int()}, "bf16, fp16 or fp32"),
        ({"logit_scale": torch.ones(2)}, "logit_scale must be a single"),
        ({"backend": "cuda"}, "choose one of auto, triton, tiled, reference"),
        ({"exchange": "mesh"}, "choose one of all_gather, ring"),
        ({"workspace_bytes": 1}, "use at least"),
        ({"image_features": torch.ones(0, 3), "text_features": torch.ones(0, 3)}, "pass at least one"),
    ],
)
def test_inputs_that_do_not_fit_get_one_line(change, message):
    inputs = {"image_features": torch.ones(5, 3), "text_features": torch.ones(5, 3), "logit_scale": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=message) as caught:
        contrastive_loss(**{**inputs, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_triton_asked_for_by_name_is_never_replaced(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="'triton' cannot run: tensors are on cpu"):
        contrastive_loss(torch.ones(2, 2), torch.ones(2, 2), torch.tensor(0.0), backend="triton")


def test_auto_says_once_what_it_picked(monkeypatch, caplog):
    from mc2_hpc.kernels.contrastive import dispatch

    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level("INFO", logger=dispatch.__name__):
        for _ in range(2):
            assert dispatch.choose_backend("auto", torch.device("cpu"), torch.float32) == "tiled"
    assert [record.message for record in caplog.records] == [
        "contrastive loss: auto selected the tiled backend (float32 features on cpu)"
    ]
    assert set(dispatch.AUTO_BACKEND.values()) <= set(BACKENDS)


@pytest.mark.parametrize(
    ("dtype", "picked"), [(torch.bfloat16, "triton"), (torch.float16, "triton"), (torch.float32, "tiled")]
)
def test_auto_picks_triton_for_half_types_on_a_gpu(monkeypatch, dtype, picked):
    from mc2_hpc.kernels.contrastive import dispatch

    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device: None)
    assert dispatch.choose_backend("auto", torch.device("cuda"), dtype) == picked
    assert dispatch.choose_backend("auto", torch.device("cpu"), dtype) == "tiled"


def test_auto_says_why_it_did_not_pick_triton(monkeypatch, caplog):
    from mc2_hpc.kernels import triton_launch
    from mc2_hpc.kernels.contrastive import dispatch

    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(triton_launch, "find_spec", lambda name: None)
    with caplog.at_level("INFO", logger=dispatch.__name__):
        assert dispatch.choose_backend("auto", torch.device("cuda"), torch.bfloat16) == "tiled"
    assert "tiled backend (bfloat16 features on cuda; triton cannot run: the package triton is not" in caplog.text
