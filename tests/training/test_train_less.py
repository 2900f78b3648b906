"""Runs that train a part of the model, adapters, or parts at rates of their own: every ZeRO stage equals plain PyTorch,
resumes bitwise, and exchanges and saves nothing for what is frozen."""

import json
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mc2_hpc.data.normalise import normalise
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import resolve
from mc2_hpc.training.token_table import TABLE
from tests.training import train_less_worker as worker
from tests.training import zero_worker

pytestmark = pytest.mark.timeout(900)
RANKS = 2
RUNS = [(case, stage) for case in worker.CASES for stage in worker.stages(case)]
FAST = [(case, stage) for case, stage in RUNS if stage in worker.fast_stages(case)]

# Written out, so that the product's own rule is not what it is compared with.
IMAGE_EMBEDDINGS = ("vision.patch", "vision.class", "vision.pos", "vision.norm_pre")
TEXT_EMBEDDINGS = ("text.token_embedding", "text.pos")
FROZEN = {
    "image tower": ("vision.",),
    "text tower and scale": ("text.", "logit_scale"),
    "blocks": (*IMAGE_EMBEDDINGS, "vision.transformer.blocks.0.", *TEXT_EMBEDDINGS),
    "adapters": ("vision.", "text."),
    "adapters of the text tower": ("vision.", "text.", "logit_scale"),
    "muon of the text tower": ("vision.",),
}
MATRICES = ("qkv.weight", "out.weight", "fc.weight", "proj.weight")


def is_frozen(case: str, name: str) -> bool:
    return name.startswith(FROZEN.get(case, ())) and "lora" not in name


def is_matrix(case: str, name: str) -> bool:
    """Whether Muon trains it."""
    return case.startswith("muon") and name.endswith(MATRICES) and not is_frozen(case, name)


def averaged(case: str) -> bool:
    """Whether the case keeps a moving average of its weights."""
    return "ema_decay" in worker.CASES[case].get("optim", {})


def every_run(wanted: Callable[[str], bool] = lambda case: True) -> pytest.MarkDecorator:
    """A test of each run of the cases that are wanted."""
    slow = {run: () if run in FAST else pytest.mark.slow for run in RUNS}
    return pytest.mark.parametrize(
        "case, stage", [pytest.param(*run, marks=slow[run]) for run in RUNS if wanted(run[0])]
    )


@pytest.fixture(scope="module")
def trained(ranks_of, tmp_path_factory):
    """``trained(case, stage)``: the worker's folder, and what it found of that run; fast runs are trained together."""
    done = {}

    def train(case: str, stage: int):
        runs = FAST if (case, stage) in FAST else [run for run in RUNS if run not in FAST]
        if runs[0] not in done:
            folder = tmp_path_factory.mktemp("train_less")
            ranks_of(RANKS, worker.__file__, folder, *map(json.dumps, runs), timeout=800)
            done[runs[0]] = folder, json.loads((folder / "found.json").read_text())
        folder, found = done[runs[0]]
        return folder, found[f"{case} {stage}"]

    return train


def learning_rate(case: str, step: int) -> float:
    """Written out: warm-up over 2 of 5 steps, then the case's schedule."""
    if case.startswith("muon"):
        return [1e-4, 2e-4, 2e-4, 1.5e-4, 0.5e-4][step]
    if case in ("image tower", "learning rates", "adapters of the text tower"):
        return [0.5e-3, 1e-3, 1e-3, 1e-3, 1e-3][step]
    return [0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.25e-3][step]


def factor(case: str, name: str) -> float:
    """Written out: that of a parameter's learning rate."""
    if case == "adapters of the text tower":
        return 0.5 ** (2 - int(name.split("blocks.")[1][0]))
    if case == "muon of the text tower":
        return 0.5 if name.startswith("text.") else 1.0
    if case != "learning rates" or name == "logit_scale":
        return 1.0
    scale, decay = (0.5, 0.7) if name.startswith("vision.") else (2.0, 0.9)
    depth = 0 if name.startswith((*IMAGE_EMBEDDINGS, *TEXT_EMBEDDINGS)) else 3
    if "blocks." in name:
        depth = 1 + int(name.split("blocks.")[1][0])
    return scale * decay ** (3 - depth)


@pytest.fixture(scope="module")
def plain():
    """``plain(case)``: rows, final weights and their moving average, of torch's AdamW and Muon without an engine."""
    found = {}

    def train(case: str):
        if case not in found:
            with worker.muon_in_fp32():
                found[case] = _plain(case)
        return found[case]

    return train


def _plain(case: str):
    optim = worker.OPTIM | worker.CASES[case].get("optim", {})
    model = build_clip(resolve(worker.configured(case, 0).model), seed=0)
    start = worker.initial(worker.configured(case, 0)).state_dict()
    parameters = dict(model.named_parameters())
    parameters |= {name: start[name].clone().requires_grad_() for name in start if "lora" in name}
    lora = worker.CASES[case].get("lora", {})
    # Muon's matrices, queries, keys and values apart.
    split = {
        name: [piece.clone().requires_grad_() for piece in (start[name].chunk(3) if "qkv" in name else [start[name]])]
        for name in parameters
        if is_matrix(case, name)
    }
    muons = [{"params": pieces, "factor": factor(case, name)} for name, pieces in split.items()]
    groups = []
    for name, parameter in parameters.items():
        if is_frozen(case, name) or name in split:
            continue
        decay = 0.1 if parameter.ndim >= 2 and "norm" not in name and "bias" not in name else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "factor": factor(case, name)})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=optim["eps"])
    optimizers: list[torch.optim.Optimizer] = [optimizer]
    if muons:
        momentum = optim.get("muon_momentum", 0.95)
        optimizers.append(torch.optim.Muon(muons, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
    towers = [p for group in (*groups, *muons) for p in group["params"] if p is not model.logit_scale]

    def whole(name):
        return torch.cat(split[name]) if name in split else parameters[name]

    averages = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    rows = []
    for step, (images, tokens) in enumerate(zero_worker.batches()[: worker.STEPS]):
        weights = {name: whole(name) for name in split}
        for name, parameter in parameters.items():
            if name.endswith("lora_A"):
                layer = name.removesuffix(".lora_A")
                product = parameters[f"{layer}.lora_B"] @ parameter
                weights[f"{layer}.weight"] = (
                    parameters[f"{layer}.weight"] + lora.get("alpha", 16) / lora["rank"] * product
                )
        image, text, scale = torch.func.functional_call(model, weights, (normalise(images), tokens))
        logits = scale.exp() * image @ text.T
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        for each in optimizers:
            each.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in towers])
        if optim.get("grad_clip"):
            torch.nn.utils.clip_grads_with_norm_(towers, optim["grad_clip"], norm)
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = learning_rate(case, step) * group["factor"]
            each.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(optim.get("max_logit_scale", 100)))
            for name in parameters:
                averages[name].mul_(optim.get("ema_decay", 0)).add_(whole(name), alpha=1 - optim.get("ema_decay", 0))
        rows.append([loss.item(), norm.item(), model.logit_scale.item()])
    return torch.tensor(rows, dtype=torch.float64), {name: whole(name).detach() for name in parameters}, averages


def final(trained, case, stage, where=""):
    """The run's final state by kind and name."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    folder, _ = trained(case, stage)
    for key, tensor in load_file(folder / f"{case} {stage}{where}.safetensors").items():
        kind, _, name = key.partition("/")
        state.setdefault(kind, {})[name] = tensor
    return state


@every_run()
def test_equals_plain_pytorch(trained, plain, case, stage):
    """Losses, gradient norms, weights and their average after five steps; also resumed at another stage, in
    micro-batches with recomputation."""
    reference_rows, *reference = plain(case)
    found = trained(case, stage)[1]
    for rows in (found["rows"], found["rows elsewhere"]):
        numbers = torch.tensor(rows, dtype=torch.float64)
        tolerance = torch.tensor([1e-6, 5e-6, 1e-6])  # the norm's gradients are differences of large numbers
        error = (numbers - reference_rows[-len(rows) :]).abs() / reference_rows[-len(rows) :]
        assert (error <= tolerance).all(), error
    for where in ("", " elsewhere"):
        state = final(trained, case, stage, where)
        assert state["weight"].keys() == reference[0].keys()
        for kind, expected in zip(("weight", "ema"), reference, strict=True):
            for name, tensor in state.get(kind, {}).items():
                error = (tensor - expected[name]).abs().max()
                assert error <= 1e-6, f"{kind} of {name}{where}: {error}"


@every_run()
def test_resumes_bitwise(trained, case, stage):
    assert trained(case, stage)[1]["resumed bitwise"]


@every_run()
def test_a_table_that_is_dealt_to_the_ranks_is_not_kept_whole(trained, case, stage):
    """Not even a frozen one, by the list of frozen parameters that evaluation thaws."""
    dense = worker.configured(case, stage).model.embedding == "dense"
    assert trained(case, stage)[1]["keeps the whole table"] == dense


@every_run(averaged)
def test_the_average_is_a_whole_model(trained, case, stage):
    """On every rank, with the weights themselves where they are frozen."""
    assert trained(case, stage)[1]["whole average"]
    state = final(trained, case, stage)
    assert all(not torch.equal(tensor, state["weight"][name]) for name, tensor in state["ema"].items())


@every_run(FROZEN.__contains__)
def test_frozen_weights_stay_and_have_no_state(trained, case, stage):
    state = final(trained, case, stage)
    start = worker.initial(worker.configured(case, 0)).state_dict()
    trained_names = {name for name in start if not is_frozen(case, name)}
    for name, tensor in state["weight"].items():
        assert torch.equal(tensor, start[name]) == (name not in trained_names), name
    matrices = {name for name in trained_names if is_matrix(case, name)}
    assert set(state["exp_avg"]) == set(state["exp_avg_sq"]) == trained_names - matrices
    assert set(state.get("momentum_buffer", {})) == matrices
    if averaged(case):
        assert set(state["ema"]) == trained_names


@every_run(FROZEN.__contains__)
def test_no_gradient_of_a_frozen_weight_is_exchanged(trained, case, stage):
    """Bytes that a rank puts into all-reduces and reduce-scatters in one step: those of the trained weights, padding,
    and the loss's own few. The token table exchanges rows by all-to-all unless it is dense."""
    dense = worker.CASES[case].get("model", {}).get("embedding") == "dense"
    sizes = {name: tensor.numel() for name, tensor in worker.initial(worker.configured(case, 0)).state_dict().items()}
    reduced = [n for n in sizes if not is_frozen(case, n) and n != "logit_scale" and (dense or n != TABLE)]
    sent = trained(case, stage)[1]["sent"]
    found = sum(count for kind, count in sent.items() if "reduce" in kind)
    expected = 4 * sum(sizes[name] for name in reduced)
    assert 0 <= found - expected <= 4096, sent
    frozen = 4 * sum(size for name, size in sizes.items() if is_frozen(case, name) and name != TABLE)
    assert frozen > 4 * 4096  # more than the tolerance
    if stage < 3:
        gathered = sum(count for kind, count in sent.items() if "allgather" in kind)
        assert gathered <= expected + 4096  # of the updated weights alone
