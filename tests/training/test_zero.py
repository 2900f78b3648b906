"""Every ZeRO stage, micro-batching and number of ranks trains like plain PyTorch with open_clip's loss."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mc2_hpc.conversion.peers import import_open_clip
from mc2_hpc.data.normalise import normalise
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import resolve
from tests.training import zero_worker as worker

pytestmark = pytest.mark.timeout(900)  # nineteen trainings


@pytest.fixture(scope="module")
def plain():
    """20 steps on one process: open_clip's ClipLoss, torch's AdamW with open_clip's groups and schedule, no engine."""
    open_clip = import_open_clip()
    config = worker.run_config(0)
    model = build_clip(resolve(config.model), seed=0)
    loss_function = open_clip.ClipLoss()
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "norm" not in n and "bias" not in n]
    others = [p for p in model.parameters() if not any(p is q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}],
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    rows = []
    for number, (images, tokens) in enumerate(worker.batches()):
        image_features, text_features, scale = model(normalise(images), tokens)
        loss = loss_function(image_features, text_features, scale.exp())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for n, p in model.named_parameters() if n != "logit_scale"])
        # Warm-up over 5 steps, then cosine decay over the other 15, written out.
        lr = 1e-3 * (number + 1) / 5 if number < 5 else 0.5e-3 * (1 + math.cos(math.pi * (number - 5) / 15))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        rows.append([loss.item(), norm.item(), model.logit_scale.item()])
    return torch.tensor(rows, dtype=torch.float64), model.state_dict()


# One rank is the plain case; 16 is not a multiple of 3.
CASES_BY_RANKS = {
    1: ["zero1", "zero3_gradcache"],
    2: [name for name, *_ in worker.CASES],
    3: ["zero0_gradcache", "zero1", "zero2", "zero3"],
}


@pytest.fixture(scope="module")
def trained(ranks_of, tmp_path_factory):
    """The worker's output folder, by number of ranks."""
    folders = {}
    for ranks, names in CASES_BY_RANKS.items():
        folders[ranks] = tmp_path_factory.mktemp(f"zero{ranks}")
        ranks_of(ranks, worker.__file__, folders[ranks], *names)
    return folders


def runs(precision: str) -> list[tuple[int, str]]:
    """(ranks, case) of every run in ``precision``."""
    wanted = {name for name, *_, found, _ in worker.CASES if found == precision}
    return [(ranks, name) for ranks, names in CASES_BY_RANKS.items() for name in names if name in wanted]


def rows_of(folder: Path, name: str) -> torch.Tensor:
    return torch.tensor(json.loads((folder / "rows.json").read_text())[name], dtype=torch.float64)


@pytest.mark.parametrize("ranks, name", runs("fp32"))
def test_equals_plain_pytorch(trained, plain, ranks, name):
    rows, reference = rows_of(trained[ranks], name), plain[0]
    assert rows.shape == (20, 3)
    torch.testing.assert_close(rows, reference, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ranks, name", runs("fp32"))
def test_weights_equal_plain_pytorch(trained, plain, ranks, name):
    weights, reference = load_file(trained[ranks] / f"{name}.safetensors"), plain[1]
    assert weights.keys() == reference.keys()
    for key, expected in reference.items():
        found = weights[key]
        if key.endswith("qkv.bias"):
            # Softmax is invariant to a bias on the keys: its gradient is rounding noise that Adam scales to full steps.
            width = expected.shape[0] // 3
            keep = [*range(width), *range(2 * width, 3 * width)]
            found, expected = found[keep], expected[keep]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("ranks, name", runs("bf16"))
def test_bf16_stays_close(trained, plain, ranks, name):
    """bf16 autocast: the loss of each of 20 steps within 1 % of fp32's; the scale, which stays fp32, within 0.5 %."""
    rows, reference = rows_of(trained[ranks], name), plain[0]
    torch.testing.assert_close(rows[:, 0], reference[:, 0], rtol=1e-2, atol=0)
    torch.testing.assert_close(rows[:, 2], reference[:, 2], rtol=5e-3, atol=0)
    # A bf16 scale would move in steps of 2^-7.
    changes = (rows[1:, 2] - rows[:-1, 2]).abs()
    assert 0 < changes.min() and changes.max() < 2**-8
