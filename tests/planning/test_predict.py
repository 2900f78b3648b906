"""Predictions from a trace given by hand, and the tables they use."""

import dataclasses
import re

import pytest

from mc2_hpc.config import config_from_dict
from mc2_hpc.errors import UserError
from mc2_hpc.planning.advise import alternatives, best_changes
from mc2_hpc.planning.machines import read_gpu, read_network
from mc2_hpc.planning.plan import RESERVE_BYTES, Assumptions, Plan, make_plans
from mc2_hpc.planning.predict import predict_step
from mc2_hpc.planning.records import CATEGORIES, Collective, Moment, StepTrace, Work
from mc2_hpc.planning.scaling import takes_over

TERA, GIGA = 1e12, 1e9
GPU = dataclasses.replace(
    read_gpu("h100"), flops=100 * TERA, products=0.5, attention=0.25, bytes_per_second=1000 * GIGA, memory=0.5
)
# 8 GPUs per node: a ring leaves it at 8 * 1.25 GB/s.
NETWORK = dataclasses.replace(read_network("ndr"), within_node=100 * GIGA, between_nodes=1.25 * GIGA, achieved=0.5)
CONFIG = config_from_dict({"steps": 1000, "global_batch": 1024, "zero": {"stage": 1}}, "test")


def trace(world_size=16, peak=10 << 30, pairs=64, **values):
    moment = Moment(operator=1, phase="backward", by_category=dict.fromkeys(CATEGORIES, 0) | {"activations": peak})
    work = {
        "forward/products": Work(flops=50 * TERA, bytes=100 * GIGA, launches=1),  # 1 s by flops, 0.2 s by memory
        "backward/other": Work(flops=0, bytes=250 * GIGA, launches=1),  # 0.5 s
        "backward/attention": Work(flops=25 * TERA, bytes=1 * GIGA, launches=1),  # 1 s
    }
    collectives = (
        Collective(kind="all-reduce", phase="backward", host=False, calls=1, bytes=int(8 * GIGA)),
        Collective(kind="all-to-all", phase="look-up", host=True, calls=1, bytes=int(8 * GIGA)),
    )
    defaults = {
        "world_size": world_size,
        "device": "cuda",
        "pairs": pairs,
        "caption_tokens": 18 * pairs,
        "peak": moment,
        "timeline": (moment,),
        "before": {},
        "work": work,
        "collectives": collectives,
        "model_flops": int(50 * TERA),
        "parameters": 10**9,
        "checkpoint_bytes": 12 * 10**9,
        "loss_backend": "triton",
    }
    return StepTrace(**{**defaults, **values})


def plan(**values):
    step_trace = values.pop("trace", trace())
    config = values.pop("config", CONFIG)
    return Plan(
        config=config,
        trace=step_trace,
        gpu_name="test",
        gpu=GPU,
        network_name="test",
        network=NETWORK,
        per_node=8,
        step=predict_step(step_trace, config, GPU, NETWORK, per_node=8),
        assumptions=Assumptions(**values),
    )


def test_training_waits_for_the_copy_of_a_checkpoint():
    averaged = plan(trace=trace(checkpoint_bytes=16 * 10**9))
    assert averaged.to_json()["checkpoint_bytes"] == 16 * 10**9
    assert averaged.checkpoint_stall == pytest.approx(plan().checkpoint_stall * 4 / 3)


def test_a_step_is_the_larger_of_flops_and_traffic_plus_what_is_not_hidden():
    step = predict_step(trace(), CONFIG, GPU, NETWORK, per_node=8)
    assert step.compute == pytest.approx({"products": 1.0, "other": 0.5, "attention": 1.0})
    assert step.limits == {"products": "flops", "other": "memory", "attention": "flops"}
    all_reduce = 2 * 15 / 16 * 8 / 5  # 8 GB in a ring of 16 over 5 GB/s
    assert step.communication == pytest.approx({"backward: all-reduce": all_reduce})
    assert step.seconds == pytest.approx(2.5 + all_reduce)


def test_zero_2_hides_what_backward_computes():
    config = dataclasses.replace(CONFIG, zero=dataclasses.replace(CONFIG.zero, stage=2))
    step = predict_step(trace(), config, GPU, NETWORK, per_node=8)
    assert step.exposed == pytest.approx(2 * 15 / 16 * 8 / 5 - 1.5)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_scatter_moves_half_and_is_hidden_too(stage):
    config = dataclasses.replace(CONFIG, zero=dataclasses.replace(CONFIG.zero, stage=stage, reduction="scatter"))
    scatter = Collective(kind="reduce-scatter", phase="backward", host=False, calls=8, bytes=int(8 * GIGA))
    gather = Collective(kind="all-gather", phase="update", host=False, calls=8, bytes=int(8 * GIGA))
    step = predict_step(trace(collectives=(scatter, gather)), config, GPU, NETWORK, per_node=8)
    sent = 15 / 16 * 8 / 5
    assert step.communication == pytest.approx({"backward: reduce-scatter": sent, "update: all-gather": sent})
    assert sent == 1.5 and step.exposed == pytest.approx(sent)  # 1.5 s of kernels in backward
    gather = dataclasses.replace(gather, phase="forward")
    step = predict_step(trace(collectives=(scatter, gather)), config, GPU, NETWORK, per_node=8)
    assert step.exposed == pytest.approx(sent - 1)  # and 1 s in forward


def test_a_node_alone_uses_its_own_links():
    step = predict_step(trace(world_size=8), CONFIG, GPU, NETWORK, per_node=8)
    assert step.exposed == pytest.approx(2 * 7 / 8 * 8 / 50)
    assert predict_step(trace(world_size=1), CONFIG, GPU, NETWORK, per_node=8).exposed == 0


def test_across_nodes_a_ring_has_the_links_of_all_gpus_of_a_node_but_none_faster_than_within_it():
    step = predict_step(trace(world_size=8), CONFIG, GPU, NETWORK, per_node=4)
    assert step.exposed == pytest.approx(2 * 7 / 8 * 8 / 2.5)
    fast = dataclasses.replace(NETWORK, between_nodes=60 * GIGA)
    assert predict_step(trace(), CONFIG, GPU, fast, per_node=8).exposed == pytest.approx(2 * 15 / 16 * 8 / 50)
    gloo = predict_step(trace(device="cpu"), CONFIG, GPU, NETWORK, per_node=8)
    assert gloo.exposed == pytest.approx(2 * 15 / 16 * 8 / 0.625)


def exchanged(group="all", size=8, phase="backward", host=False):
    return Collective(kind="all-to-all", phase=phase, group=group, host=host, calls=1, bytes=int(size * GIGA))


def test_what_ranks_send_each_other_leaves_the_node_through_their_own_links():
    rows = exchanged(phase="look-up")
    of_16 = predict_step(trace(collectives=(rows,)), CONFIG, GPU, NETWORK, per_node=8)
    assert of_16.exposed == pytest.approx(1 / 2 * 8 / 0.625)  # to the 8 of 16 ranks that are elsewhere
    of_8 = predict_step(trace(collectives=(rows,), world_size=8), CONFIG, GPU, NETWORK, per_node=8)
    assert of_8.exposed == pytest.approx(7 / 8 * 8 / 50)
    send = dataclasses.replace(rows, kind="send")
    assert predict_step(trace(collectives=(send,)), CONFIG, GPU, NETWORK, per_node=8).exposed == 8 / 0.625


BF16 = config_from_dict(
    {"steps": 1000, "global_batch": 1024, "zero": {"stage": 1, "reduction": "scatter", "reduce_dtype": "bf16"}}, "test"
)


def test_gradients_in_bf16_are_exchanged_within_nodes_and_between_them():
    two_levels = trace(world_size=32, collectives=(exchanged("node"), exchanged("between", size=1)))
    step = predict_step(two_levels, BF16, GPU, NETWORK, per_node=8)
    seconds = 7 / 8 * 8 / 50 + 3 / 4 * 1 / 0.625
    assert step.communication == pytest.approx({"backward: all-to-all": seconds})
    assert step.exposed == 0  # 1.5 s of kernels in backward


@pytest.mark.parametrize(
    "collectives, world_size", [((exchanged(),), 8), ((exchanged("node"), exchanged("between", size=1)), 32)]
)
def test_scaling_exchanges_gradients_as_a_run_of_each_size_does(collectives, world_size):
    """From one node's trace and from several nodes', the same."""
    work = {"forward/other": Work(bytes=GIGA)}  # which hides nothing of backward
    found = plan(trace=trace(world_size=world_size, collectives=collectives, work=work), config=BF16)
    exposed = {point.gpus: point.exposed for point in found.scaling(strong=False)}
    for gpus in (2, 8):
        assert exposed[gpus] == pytest.approx((gpus - 1) / gpus * 8 / 50)
    for nodes in (2, 4, 512):
        assert exposed[8 * nodes] == pytest.approx(7 / 8 * 8 / 50 + (nodes - 1) / nodes * 1 / 0.625)
    alone = dataclasses.replace(found, per_node=1)
    assert [point.exposed for point in alone.scaling(strong=False)][1] == pytest.approx(1 / 2 * 8 / 0.625)


def test_scaling_keeps_the_traced_point_and_finds_where_the_network_takes_over():
    found = plan()
    weak, strong = (list(found.scaling(strong=strong)) for strong in (False, True))
    (same,) = (point for point in weak if point.gpus == 16)
    assert same in strong and same.seconds == pytest.approx(found.step.seconds)
    assert same.pairs_per_second == pytest.approx(found.pairs_per_second)
    assert [point.gpus for point in weak] == [2**power for power in range(13)]
    assert [point.gpus for point in strong] == [2**power for power in range(11)]  # 1,024 pairs
    assert weak[0].exposed == 0 and takes_over(iter(weak)) == 16  # 3 s of all-reduce, 2.5 s of kernels
    assert strong[3].seconds == pytest.approx(2 * 2.5 + 2 * 7 / 8 * 8 / 50)  # 8 GPUs: twice the pairs of 16


def test_muons_work_is_divided_and_in_bf16():
    work = {"forward/products": Work(flops=50 * TERA), "muon/products": Work(flops=10 * TERA)}
    shares = {2**power: max(0.1, 1 / 2**power) for power in range(13)}  # a tenth is in one matrix
    found = plan(trace=trace(work=work, muon_shares=shares))
    precise = dataclasses.replace(CONFIG, precision="fp32")
    slower = predict_step(trace(work=work), precise, GPU, NETWORK, per_node=8)
    assert slower.compute["products"] == pytest.approx(0.2 + 50 * TERA / (0.5 * GPU.flops_fp32))
    seconds = {point.gpus: point.seconds - point.exposed for point in found.scaling(strong=False)}
    assert [seconds[gpus] for gpus in (1, 8, 16, 4096)] == pytest.approx([1 + 2, 1 + 0.25, 1 + 0.2, 1 + 0.2])


def test_days_money_and_goodput():
    found = plan(price=2.0, gpu_failures_per_year=0.0)
    assert found.days == pytest.approx(1000 * found.step.seconds / 86_400)
    stall = 12e9 / 16 / 20e9
    assert found.goodput == pytest.approx(1 / (1 + stall / (2000 * found.step.seconds)))
    assert found.gpu_hours == pytest.approx(found.days / found.goodput * 24 * 16)
    assert found.to_json()["predicted"]["money"] == pytest.approx(2 * found.gpu_hours)
    failing = plan(gpu_failures_per_year=1.0)
    assert failing.goodput < found.goodput


def test_which_pairs_fit():
    smaller = trace(peak=6 << 30, pairs=32)
    found = dataclasses.replace(plan(), smaller=smaller)
    per_pair = (4 << 30) / 32
    assert found.pairs_that_fit == int(64 + (80e9 - RESERVE_BYTES - (10 << 30)) / per_pair)
    assert found.fits and not plan(trace=trace(peak=79 << 30)).fits


def test_what_would_fit():
    large = dataclasses.replace(plan(trace=trace(peak=100 << 30)), smaller=trace(peak=60 << 30, pairs=32))
    fit = large.pairs_that_fit
    assert 0 < fit < 64
    gpus = -(-1024 // fit)
    assert (
        large.cure
        == f"about {fit} of 64 pairs per GPU do: set model.recompute=full, micro_batch={fit}, or use {gpus} GPUs"
    )
    nothing = dataclasses.replace(large, smaller=trace(peak=99 << 30, pairs=32))
    assert nothing.cure.startswith("not even one pair per GPU does: set model.recompute=full, a higher zero.stage")
    assert not plan().cure


def test_changes_are_sorted_by_gain_and_must_fit():
    found = alternatives(CONFIG)
    assert set(found) == {"model.recompute=selective", "model.recompute=full", "zero.stage=2"}
    assert found["zero.stage=2"].zero.stage == 2
    fast = dataclasses.replace(trace(), work={"forward/products": Work(flops=TERA)})
    faster = dataclasses.replace(trace(), work={"forward/products": Work(flops=0.5 * TERA)}, collectives=())
    large = dataclasses.replace(faster, peak=trace(peak=79 << 30).peak)
    others = [(name, plan(trace=each)) for name, each in (("a", fast), ("b", faster), ("c", large), ("d", trace()))]
    assert [name for name, _ in best_changes(plan(), others)] == ["b", "a"]


def test_an_unknown_gpu_gets_one_line_with_the_known_ones():
    with pytest.raises(UserError, match=r"--gpu h900: choose one of a100, h100, h200, b200, cpu, or a YAML file"):
        read_gpu("h900")


def test_a_gpu_of_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    values = "flops: 1e12\nflops_fp32: 1e12\nbytes_per_second: 1e11\nmemory_bytes: 1e10\nsource: mine\n"
    path.write_text(values + "products: 0.5\nattention: 0.5\nmemory: 0.5\nfractions_source: measured\n")
    assert read_gpu(str(path)).bytes_per_second == 1e11
    path.write_text(values + "products: 1.5\nattention: 0.5\nmemory: 0.5\nfractions_source: measured\n")
    with pytest.raises(UserError, match="products=1.5"):
        read_gpu(str(path))


@pytest.mark.parametrize(
    ("values", "cure"),
    [
        ({"stages": [{"steps": 8}]}, "plan one with stages=[] and its settings"),
        ({"precision": "fp8"}, "plan them in bf16: precision=bf16"),
    ],
)
def test_a_setting_that_is_not_planned_is_refused(values, cure):
    config = config_from_dict({"global_batch": 1024, **values}, "test")
    machine = {"gpus": 8, "per_node": 8, "gpu_name": "test", "gpu": GPU, "network_name": "test", "network": NETWORK}
    with pytest.raises(UserError, match=f"{re.escape(cure)}$"):
        make_plans([config], **machine, assumptions=Assumptions())
