"""Gradients scattered and reduced in bf16, and weights gathered in bf16: their values, and their bytes on the wire."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mc2_hpc.config import config_from_dict
from mc2_hpc.conversion.peers import import_open_clip
from mc2_hpc.data.normalise import normalise
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import resolve
from mc2_hpc.training.gradient_scatter import in_buckets
from mc2_hpc.training.weight_gather import only_in_products
from tests.training import wire_worker as worker
from tests.training import zero_worker

pytestmark = pytest.mark.timeout(900)  # two dozen short trainings

CASES_BY_RANKS = {
    1: ["one_whole", "one_scatter_bf16"],
    2: [name for name in worker.CASES if not name.startswith(("one", "nodes"))],
    3: ["scatter2_2", "scatter_bf16_1_1"],
    4: ["nodes1_1", "nodes2_2", "scatter_bf16_1_1"],
}
BETA1 = 0.9


class Found:
    """What the ranks of a job wrote."""

    def __init__(self, folder):
        self._folder = folder
        self.rows = json.loads((folder / "found.json").read_text())

    def state(self, name, step=worker.STEPS - 1):
        return load_file(self._folder / f"{name}.{step}.safetensors")

    def used(self, name):
        """The weights that the last evaluation would use."""
        return load_file(self._folder / f"{name}.used.safetensors")

    def own(self, name):
        """Rank 0's averaged gradients of the first step, flat, by group."""
        return load_file(self._folder / f"{name}.own.safetensors")

    def sizes(self, name, phase, kind, group="all"):
        """(calls, bytes) of the last step."""
        rows = [row[3:] for row in self.rows[name]["collectives"] if row[:3] == [phase, kind, group]]
        return [sum(column) for column in zip(*rows, strict=True)] or [0, 0]


@pytest.fixture(scope="module")
def found(ranks_of, tmp_path_factory):
    """By number of ranks."""
    results = {}
    for ranks, names in CASES_BY_RANKS.items():
        folder = tmp_path_factory.mktemp(f"wire{ranks}")
        ranks_of(ranks, worker.__file__, folder, *names)
        results[ranks] = Found(folder)
    return results


@pytest.fixture(scope="module")
def gradient():
    """That of the first batch by name: open_clip's loss of the whole batch in fp64, on one process."""
    config = zero_worker.run_config(0)
    model = build_clip(resolve(config.model), seed=0).double()
    images, tokens = zero_worker.batches()[0]
    image_features, text_features, scale = model(normalise(images, torch.float64), tokens)
    import_open_clip().loss.ClipLoss()(image_features, text_features, scale.exp()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def error(state, gradient):
    """Of AdamW's first moment after one step, relative to what the gradient makes it, over all parameters."""
    pairs = [((1 - BETA1) * grad, state[f"exp_avg.{name}"]) for name, grad in gradient.items()]
    difference = torch.cat([(moment - expected).flatten() for expected, moment in pairs])
    return float(difference.norm() / torch.cat([expected.flatten() for expected, _ in pairs]).norm())


PLAIN = [(ranks, name) for ranks, names in CASES_BY_RANKS.items() for name in names if worker.CASES[name][1] == "fp32"]


@pytest.mark.parametrize("ranks, name", [case for case in PLAIN if "clipped" not in case[1]])
def test_equals_the_gradient_of_the_whole_batch(found, gradient, ranks, name):
    """To rounding: bf16 has 8 bits, so a rank's part and a node's sum are within 0.2 % each. fp32 is within 1e-5."""
    size = error(found[ranks].state(name, step=0), gradient)
    if worker.configured(name).zero.reduce_dtype == "bf16":
        assert 2e-4 < size < 5e-3
    else:
        assert size < 1e-5


@pytest.mark.parametrize("stage, num_micro", [(1, 1), (2, 2)])
def test_scattered_in_fp32_is_bitwise_deepspeeds_all_reduce(found, stage, num_micro):
    """On two ranks, where a sum has only one order."""
    whole, scattered = (found[2].state(f"{name}{stage}_{num_micro}") for name in ("whole", "scatter"))
    assert whole.keys() == scattered.keys()
    assert all(torch.equal(whole[key], scattered[key]) for key in whole)
    norms = [found[2].rows[f"{name}{stage}_{num_micro}"]["norms"] for name in ("whole", "scatter")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_clipping_and_the_average_see_scattered_gradients(found):
    norms = [found[2].rows[f"{name}_clipped"]["norms"] for name in ("whole", "scatter")]
    assert min(norms[0]) > 0.5 and norms[0] == pytest.approx(norms[1], rel=1e-6)
    whole, scattered = (found[2].state(f"{name}_clipped") for name in ("whole", "scatter"))
    assert whole.keys() == scattered.keys() and any(key.startswith("ema.") for key in whole)
    for key, value in whole.items():
        torch.testing.assert_close(scattered[key], value, rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_in_fp32_and_are_rounded_once(found):
    whole, scattered = (found[1].own(name) for name in ("one_whole", "one_scatter_bf16"))
    assert whole.keys() == scattered.keys() and len(whole) == 2
    for group, gradient in whole.items():
        assert not torch.equal(gradient, gradient.bfloat16().float())
        assert torch.equal(scattered[group], gradient.bfloat16().float())


@pytest.mark.parametrize("stage, num_micro, passes", [(1, 1, 1), (2, 2, 2)])
def test_half_the_bytes_in_bf16_and_nothing_all_reduced(found, stage, num_micro, passes):
    """Stage 2 reduces every micro-batch, as DeepSpeed does. Padding is at most 2 elements per rank and bucket."""
    fp32, bf16 = (f"{name}{stage}_{num_micro}" for name in ("scatter", "scatter_bf16_"))
    parameters = sum(
        tensor.numel()
        for name, tensor in found[2].used(fp32).items()
        if name not in ("logit_scale", "text.token_embedding.weight")
    )
    calls, size = found[2].sizes(fp32, "backward", "reduce-scatter")
    assert calls >= 10 * passes and 0 <= size / (4 * passes) - parameters < 2 * 2 * calls
    assert found[2].sizes(bf16, "backward", "all-to-all") == [calls, size / 2]
    assert found[2].sizes(bf16, "backward", "reduce-scatter") == [0, 0]
    whole = found[2].sizes(f"whole{stage}_{num_micro}", "backward", "all-reduce")
    assert whole[1] == pytest.approx(size, rel=0.01)
    for name in (fp32, bf16):
        assert found[2].sizes(name, "backward", "all-reduce") == [0, 0]


@pytest.mark.parametrize("stage, num_micro", [(1, 1), (2, 2)])
def test_a_node_sends_the_others_its_sum_alone(found, stage, num_micro):
    name = f"nodes{stage}_{num_micro}"
    calls, size = found[4].sizes(name, "backward", "all-to-all", "node")
    assert calls and found[4].sizes(name, "backward", "all-to-all", "between") == [calls, size / 2]
    assert found[4].sizes(name, "backward", "all-to-all") == [0, 0]
    if stage == 1:
        assert found[4].sizes("scatter_bf16_1_1", "backward", "all-to-all") == [calls, size]


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeeds_all_reduce_in_bf16_is_half_too(found, stage):
    whole = found[2].sizes("whole1_1", "backward", "all-reduce")[1]
    assert found[2].sizes(f"whole_bf16_{stage}_1", "backward", "all-reduce")[1] == pytest.approx(whole / 2, rel=0.01)


def test_buckets_are_sent_while_backward_runs(found):
    """Those of the text tower and of the image tower's last block, before the gradient of its first is there."""
    calls, _ = found[2].sizes("scatter1_1", "backward", "reduce-scatter")
    for started in found[2].rows["scatter1_1"]["started before the first block"]:
        assert calls / 2 < started < calls


def test_a_gather_in_bf16_trains_the_same_bit_for_bit(found):
    """Masters, moments and average, which are what a checkpoint has; linear layers compute with rounded weights."""
    plain, rounded = (found[2].state(name) for name in ("autocast", "gather_bf16"))
    assert plain.keys() == rounded.keys()
    assert all(torch.equal(plain[key], rounded[key]) for key in plain)
    for name, value in found[2].used("gather_bf16").items():
        master = rounded[f"weight.{name}"]
        assert torch.equal(value, master.bfloat16().float() if only_in_products(name) else master), name
    assert not torch.equal(rounded["weight.vision.projection"], rounded["weight.vision.projection"].bfloat16().float())


def test_a_gather_in_bf16_is_half_the_bytes(found):
    whole = found[2].sizes("autocast", "update", "all-gather")[1]
    used = found[2].used("gather_bf16")
    halved = sum(tensor.numel() for name, tensor in used.items() if only_in_products(name))
    assert halved / sum(tensor.numel() for tensor in used.values()) > 0.8
    assert found[2].sizes("gather_bf16", "update", "all-gather") == [0, 0]
    calls, size = found[2].sizes("gather_bf16", "gather", "all-gather")
    assert calls and size == pytest.approx(whole - 2 * halved, abs=8 * 2 * calls)


def test_weights_that_are_used_unrounded_are_gathered_in_fp32():
    names = [name for name, _ in build_clip(resolve(zero_worker.run_config(0).model), seed=0).named_parameters()]
    chosen = {name for name in names if only_in_products(name)}
    assert {name for name in names if name.endswith("weight") and "norm" not in name} - chosen == {
        "text.token_embedding.weight"
    }
    assert {name for name in chosen if not name.endswith("weight")} == {"vision.projection", "text.projection"}


def test_buckets_keep_the_order_and_the_settings():
    parameters = [torch.nn.Parameter(torch.empty(size)) for size in (3, 4, 20, 1, 2)]
    groups = [{"params": parameters[:4], "weight_decay": 0.1}, {"params": parameters[4:], "weight_decay": 0.0}]
    assert in_buckets(groups) == groups
    divided = in_buckets(groups, largest=7, apart=[parameters[3]])
    sizes = [([each.numel() for each in group["params"]], group["weight_decay"]) for group in divided]
    assert sizes == [([1], 0.1), ([3, 4], 0.1), ([20], 0.1), ([2], 0.0)]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"zero": {"stage": 3, "reduction": "scatter"}}, r"zero\.reduction=scatter and zero\.stage=3"),
        ({"zero": {"stage": 0, "gather_dtype": "bf16"}}, r"zero\.gather_dtype=bf16 and zero\.stage=0"),
        ({"zero": {"gather_dtype": "bf16"}, "precision": "fp32"}, r"gather_dtype=bf16 and precision=fp32: .*; set"),
        ({"zero": {"reduce_dtype": "fp16"}}, r"zero\.reduce_dtype='fp16': choose one of fp32, bf16"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(values, message):
    with pytest.raises(UserError, match=message):
        config_from_dict(values)
