"""The contrastive loss with a teacher in one process: value and gradients, edge cases, cost, and errors."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mc2_hpc.kernels.contrastive import Teacher, contrastive_loss, distilled_contrastive_loss, reference_terms
from mc2_hpc.kernels.contrastive.dispatch import SMALLEST_WORKSPACE_BYTES
from mc2_hpc.kernels.contrastive.statistics import DistilledStatistics

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOG_20 = torch.tensor(math.log(20))


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(1, 90),
    width=st.integers(1, 40),
    teacher_width=st.integers(1, 40),
    log_scale=st.floats(0, math.log(100)),
    teacher_scale=st.floats(1, 200),
    weight=st.floats(0.01, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_equal_float64(
    kit, pairs, width, teacher_width, log_scale, teacher_scale, weight, dtype, seed
):
    image, text = kit.features(pairs, width, dtype, seed=seed)
    teacher = Teacher(*kit.features(pairs, teacher_width, dtype, seed=seed + 100), teacher_scale, weight)
    scale = torch.tensor(log_scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    found = kit.solve_distilled(image, text, scale, teacher, backend="tiled", workspace_bytes=SMALLEST_WORKSPACE_BYTES)
    kit.assert_distilled(found, image, text, scale, teacher)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_a_student_that_equals_its_teacher_does_not_diverge(kit, backend):
    image, text = kit.features(70, 12, torch.float32)
    inputs = [x.requires_grad_() for x in (image, text)]
    teacher = Teacher(image.detach(), text.detach(), scale=20.0)
    loss, (contrastive, divergence) = distilled_contrastive_loss(*inputs, LOG_20, teacher, backend=backend)
    assert abs(divergence) < 1e-5 < contrastive
    plain = contrastive_loss(*inputs, LOG_20, backend=backend)
    torch.testing.assert_close(contrastive, plain.detach(), rtol=1e-6, atol=0)
    pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(plain, inputs), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_gradcheck(kit):
    inputs = [*kit.features(7, 3, torch.float64), torch.tensor(1.2, dtype=torch.float64)]
    teacher = Teacher(*kit.features(7, 4, torch.float64, seed=3), 5.0, 0.6)

    def loss(*inputs):
        return distilled_contrastive_loss(*inputs, teacher, backend="tiled")[0]

    torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


def test_the_teacher_gets_no_gradient(kit):
    image, text = (x.requires_grad_() for x in kit.features(9, 4, torch.float32))
    features = [x.requires_grad_() for x in kit.features(9, 6, torch.float32, seed=1)]
    for backend in ("tiled", "reference"):
        loss, terms = distilled_contrastive_loss(image, text, LOG_20, Teacher(*features), backend=backend)
        assert not terms.requires_grad
        loss.backward()
        assert all(x.grad is None for x in features)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)])
def test_only_the_wanted_gradients(kit, wanted):
    inputs = [*kit.features(20, 6, torch.float64), LOG_20.double()]
    teacher = Teacher(*kit.features(20, 5, torch.float64, seed=1), 30.0, 2.0)
    true = kit.solve_distilled(*inputs, teacher, backend="reference")
    for index in wanted:
        inputs[index].requires_grad_()
    distilled_contrastive_loss(*inputs, teacher, backend="tiled")[0].backward()
    for index, name in enumerate(("image", "text", "logit_scale")):
        if index in wanted:
            torch.testing.assert_close(inputs[index].grad, getattr(true, name), rtol=1e-9, atol=1e-12)
        else:
            assert inputs[index].grad is None


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_two_runs_give_the_same_bits(kit, dtype):
    image, text = kit.features(150, 24, dtype)
    teacher = Teacher(*kit.features(150, 32, dtype, seed=1))
    runs = [kit.solve_distilled(image, text, LOG_20, teacher, workspace_bytes=1 << 16) for _ in range(2)]
    for name in ("loss", "image", "text", "logit_scale"):
        assert torch.equal(getattr(runs[0], name), getattr(runs[1], name)), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", range(4))
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_one_bad_feature_makes_the_loss_nan(kit, bad, whose, backend):
    features = [*kit.features(70, 5, torch.float32), *kit.features(70, 7, torch.float32, seed=1)]
    features[whose][66, 2] = bad
    options = {"backend": backend, "workspace_bytes": SMALLEST_WORKSPACE_BYTES}
    loss, _ = distilled_contrastive_loss(*features[:2], LOG_20, Teacher(*features[2:]), **options)
    assert loss.isnan()


def test_the_logits_of_a_teacher_cost_a_product_each_way(kit):
    pairs, width, teacher_width = 192, 64, 96
    inputs = [x.requires_grad_() for x in kit.features(pairs, width, torch.float32)]
    teacher = Teacher(*kit.features(pairs, teacher_width, torch.float32))
    options = {"backend": "tiled", "workspace_bytes": SMALLEST_WORKSPACE_BYTES}
    with FlopCounterMode(display=False) as counter:
        loss, _ = distilled_contrastive_loss(*inputs, LOG_20, teacher, **options)
        assert counter.get_total_flops() == 2 * pairs**2 * (width + teacher_width)
        loss.backward()
    assert counter.get_total_flops() == pairs**2 * (8 * width + 4 * teacher_width)


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.tuples(st.floats(-300, 300), st.floats(-300, 300)), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
def test_merged_statistics_give_the_divergence_of_the_whole(logits, cuts):
    student, teacher = torch.tensor(logits, dtype=torch.float64).unbind(1)
    running = DistilledStatistics.empty(1, device=student.device, dtype=student.dtype)
    bounds = [0, *sorted(min(cut, len(student)) for cut in cuts), len(student)]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if start == stop:
            continue
        s, u = student[start:stop], teacher[start:stop]
        p = torch.exp(u - u.max())
        sums = (s.max(), torch.exp(s - s.max()).sum(), u.max(), p.sum(), (p * (u - s)).sum())
        running.merge_(*DistilledStatistics.pack(*(x[None] for x in sums)))
    expected = (teacher.softmax(0) * (teacher.log_softmax(0) - student.log_softmax(0))).sum()
    torch.testing.assert_close(running.divergence()[0], expected, rtol=1e-10, atol=1e-10)


def test_the_reference_is_pytorchs_divergence():
    """Of two pairs whose softmax is easily written out: student 1/2 and 1/2, teacher 1/4 and 3/4."""
    student = torch.zeros(2, 2, dtype=torch.float64)
    teacher = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]], dtype=torch.float64)
    terms = reference_terms(student, student, torch.tensor(0.0), teacher, torch.eye(2, dtype=torch.float64), 1.0)
    divergence = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    torch.testing.assert_close(terms, torch.tensor([math.log(2), divergence], dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_features": torch.ones(4, 3)}, r"both be \(5, width\) like the student's, got \(5, 3\) and \(4, 3\)"),
        ({"image_features": torch.ones(4, 3), "text_features": torch.ones(4, 3)}, r"both be \(5, width\)"),
        ({"text_features": torch.ones(5, 3).half()}, "must have the student's type torch.float32"),
        ({"text_features": torch.ones(5, 3, device="meta")}, "must be on the student's device cpu"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"scale": math.inf}, "scale must be positive and finite, got inf"),
        ({"weight": -1.0}, "weight must be positive and finite, got -1.0"),
    ],
)
def test_bad_teachers_get_one_line(change, message):
    teacher = dataclasses.replace(Teacher(torch.ones(5, 3), torch.ones(5, 3)), **change)
    with pytest.raises(ValueError, match=message) as caught:
        distilled_contrastive_loss(torch.ones(5, 8), torch.ones(5, 8), LOG_20, teacher)
    assert "\n" not in str(caught.value)
