"""Traces on fake tensors against real steps: peak memory, flops, and the bytes of every collective."""

import itertools
import json

import pytest

from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.lora import add_adapters
from mc2_hpc.models.presets import num_parameters, resolve
from mc2_hpc.models.weights import ModelCard, read_card, write_card
from mc2_hpc.planning.captions import draw_captions
from mc2_hpc.planning.plan import trace_drawn
from mc2_hpc.planning.processes import in_processes
from mc2_hpc.training.freezing import adapters_of, freeze
from tests.planning import real_step
from tests.planning.real_step import tiny_config, traced

CASES = list(itertools.product((0, 1, 2, 3), ("none", "selective", "full"), (0, 3)))
FAST = [(0, "none", 0), (1, "full", 3), (2, "selective", 0), (3, "none", 3), (3, "full", 0)]


def compare(**values):
    """A real step on one rank and its trace."""
    config = tiny_config(**values)
    (found,) = in_processes(real_step.real, [{"config": config}])
    (trace,) = in_processes(traced, [{"config": config, "world_size": 1}])
    return found, trace


def check(found, trace):
    assert trace.peak.bytes == pytest.approx(found["peak"], rel=0.05)
    assert trace.executed_flops == pytest.approx(found["flops"], rel=0.01)
    assert max(trace.timeline, key=lambda moment: moment.bytes) == trace.peak


@pytest.mark.parametrize("stage, recompute, micro_batch", FAST)
def test_one_rank(stage, recompute, micro_batch):
    check(*compare(zero={"stage": stage}, model={"recompute": recompute}, micro_batch=micro_batch))


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"patch_dropout": 0.5}},
        {"model": {"patch_dropout": 0.5}, "micro_batch": 3},
        {"data": {"lanes": 1, "features": "/f"}, "freeze": {"vision": "all"}},
        {"optim": {"ema_decay": 0.99}},
        {"lora": {"rank": 4}},
        {"lora": {"rank": 4, "text": False}, "freeze": {"text": "all"}, "model": {"recompute": "full"}},
        {"optim": {"matrices": "muon"}},
        {"optim": {"matrices": "muon", "ema_decay": 0.99, "grad_clip": 1.0}, "micro_batch": 3},
    ],
)
def test_a_step_that_computes_less_or_keeps_more(values):
    check(*compare(zero={"stage": 1}, **values))


def write_teacher(folder, **model):
    """The folder of a teacher: the sizes alone, as a plan reads nothing else."""
    arch = resolve(tiny_config(size=3, model=model).model)
    write_card(folder, ModelCard(arch=arch, tokenizer_style="xlmv"))
    return str(folder)


OTHER_IDS = {"vocab_size": 900, "context_length": 24, "width": 144, "heads": 3, "layers": 4}


@pytest.mark.parametrize(
    ("model", "values"),
    [
        ({}, {"micro_batch": 3}),
        ({}, {"distill": {"micro_batch": 3}}),
        ({}, {"pairs": 64, "micro_batch": 8}),
        ({"vision": {"image_size": 64, "width": 192, "layers": 4, "head_width": 32}, "text": OTHER_IDS}, {}),
    ],
)
def test_a_teacher(tmp_path, model, values):
    teacher = write_teacher(tmp_path, **model)
    found, trace = compare(**{**values, "distill": {"teacher": teacher, **values.get("distill", {})}})
    check(found, trace)
    weights = 4 * num_parameters(read_card(tmp_path).arch)
    assert trace.before["teacher"] == pytest.approx(weights, rel=0.01) and trace.before["teacher"] > weights
    assert trace.total(phase="teacher").flops > 0
    assert trace.checkpoint_bytes == 12 * trace.parameters  # the student's


def test_stored_features_of_a_teacher(tmp_path):
    found, trace = compare(distill={"features": str(tmp_path)})
    check(found, trace)
    assert trace.before["teacher"] == 2 * 8 * 32 * 4
    (tmp_path / "features.json").write_text('{"width": 48}')
    config = tiny_config(distill={"features": str(tmp_path)})
    (wider,) = in_processes(traced, [{"config": config, "world_size": 1}])
    assert wider.before["teacher"] == 2 * 8 * 48 * 4
    assert wider.total("loss").flops > trace.total("loss").flops


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("stage, recompute, micro_batch", CASES)
def test_one_rank_at_three_sizes(stage, recompute, micro_batch, size):
    check(*compare(size=size, zero={"stage": stage}, model={"recompute": recompute}, micro_batch=micro_batch))


def on_ranks(ranks_of, folder, world_size, **values):
    """Real steps on gloo ranks; returns rank 0's."""
    (folder / "cases.json").write_text(json.dumps({"world_size": world_size, **values}))
    ranks_of(world_size, real_step.__file__, folder)
    return json.loads((folder / "rank0.json").read_text())


def check_ranks(ranks_of, folder, world_size, **values):
    found = on_ranks(ranks_of, folder, world_size, **values)
    config = tiny_config(world_size=world_size, **values)
    (trace,) = in_processes(traced, [{"config": config, "world_size": world_size}])
    assert sorted([c.kind, c.calls, c.bytes] for c in trace.collectives) == found["collectives"]
    if config.zero.reduction != "scatter":  # gloo's threads keep copies of what they scatter, as long as they take
        assert trace.peak.bytes == pytest.approx(found["peak"], rel=0.05)


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks(ranks_of, tmp_path, stage):
    check_ranks(ranks_of, tmp_path, 2, zero={"stage": stage})


WIRE = {"stage": 2, "reduction": "scatter", "reduce_dtype": "bf16", "gather_dtype": "bf16", "bucket_elements": 20_000}


def test_scattered_and_gathered_in_bf16(ranks_of, tmp_path):
    """Two micro-batches, so that gradients are reduced twice."""
    check_ranks(ranks_of, tmp_path, 2, zero=WIRE, precision="bf16", micro_batch=4)


@pytest.mark.parametrize("stage", [0, 2])
def test_muon_on_two_ranks(ranks_of, tmp_path, stage):
    check_ranks(ranks_of, tmp_path, 2, zero={"stage": stage}, optim={"matrices": "muon"})


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_on_two_ranks(ranks_of, tmp_path, stage):
    check_ranks(ranks_of, tmp_path, 2, zero={"stage": stage}, lora={"rank": 4})


def test_a_teacher_on_two_ranks(ranks_of, tmp_path):
    teacher = write_teacher(tmp_path / "teacher")
    check_ranks(ranks_of, tmp_path, 2, zero={"stage": 1}, distill={"teacher": teacher}, micro_batch=4)


def test_a_teacher_on_imagined_gpus(tmp_path):
    """The Triton loss has one more product over the teacher's width; captions with ids of its own have padding."""
    pytest.importorskip("triton")
    same, own = (write_teacher(tmp_path / str(size), text={**OTHER_IDS, "vocab_size": size}) for size in (800, 900))
    pairs = {"world_size": 16, "pairs": 64, "precision": "bf16"}
    configs = [tiny_config(**pairs), *(tiny_config(**pairs, distill={"teacher": each}) for each in (same, own))]
    call = {"ranks": 16, "per_node": 8, "caption_tokens": 8, "device_type": "cuda"}
    alone, packed, padded = in_processes(trace_drawn, [{"config": each, **call} for each in configs])
    assert packed.loss_backend == "triton"
    more = packed.total("loss", "products").flops - alone.total("loss", "products").flops
    assert more == pytest.approx(2 * 2 * 64 * 1024 * 96)  # in statistics and in gradients, 96 wide
    assert alone.total("teacher").flops == 0 < packed.total("teacher").flops < padded.total("teacher").flops


def test_muons_products_are_divided_as_the_matrices_are():
    config = tiny_config(world_size=2, optim={"matrices": "muon"})
    alone = tiny_config(optim={"matrices": "muon"})
    two, one = in_processes(traced, [{"config": config, "world_size": 2}, {"config": alone, "world_size": 1}])
    assert two.muon_shares[1] == 1 and two.muon_shares[4096] < two.muon_shares[2] < 0.6
    share = two.work["muon/products"].flops / one.work["muon/products"].flops
    assert share == pytest.approx(two.muon_shares[2])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(
    "values",
    [
        {"zero": {"stage": 0}, "model": {"embedding": "dense"}},
        {"zero": {"stage": 2}, "micro_batch": 3},
        {"zero": {"stage": 3}, "model": {"recompute": "full"}, "micro_batch": 3},
        {"zero": {"stage": 1}, "loss": {"exchange": "ring"}},
        {"zero": {"stage": 1}, "optim": {"grad_clip": 1.0}},
        {"zero": {**WIRE, "stage": 1}, "precision": "bf16"},
        {"zero": {**WIRE, "stage": 1}, "precision": "bf16", "optim": {"matrices": "muon"}},
    ],
)
def test_more_ranks(ranks_of, tmp_path, world_size, values):
    check_ranks(ranks_of, tmp_path, world_size, **values)


@pytest.mark.parametrize(
    ("values", "per_parameter"),
    [
        ({}, (4, 8)),
        ({"optim": {"ema_decay": 0.99}}, (4, 12)),
        ({"freeze": {"text": "all"}}, (4, 8)),
        ({"lora": {"rank": 4}}, (4, 8)),
    ],
)
def test_the_size_of_a_checkpoint(values, per_parameter):
    """Weights of all parameters; moments, and an average if there is one, of those that are trained."""
    config = tiny_config(world_size=2, **values)
    (trace,) = in_processes(traced, [{"config": config, "world_size": 2}])
    clip = CLIP(resolve(config.model))
    if config.lora is not None:
        add_adapters(clip, adapters_of(config))
    freeze(clip, config.freeze)
    trained = sum(parameter.numel() for parameter in clip.parameters() if parameter.requires_grad)
    assert trace.parameters == sum(parameter.numel() for parameter in clip.parameters())
    assert trace.checkpoint_bytes == per_parameter[0] * trace.parameters + per_parameter[1] * trained


def test_captions_are_not_longer_than_the_context():
    found = draw_captions([64, 64], mean=100, vocab_size=10_000, context_length=77, eos_id=2)
    assert max(found.lengths) == 77 and sum(found.lengths) / 64 < 77
    expected = draw_captions([64, 64], mean=sum(found.lengths) / 64, vocab_size=10_000, context_length=77, eos_id=2)
    assert len(found.asked[1]) == pytest.approx(len(expected.asked[1]), rel=0.1)
