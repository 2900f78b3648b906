"""Learning-rate schedule and AdamW groups, compared with open_clip's."""

import pytest
import torch

from mc2_hpc.config import OptimConfig
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.presets import PRESETS
from mc2_hpc.training.optim import decays, learning_rate, parameter_groups


@pytest.mark.parametrize("warmup, total", [(10, 100), (1, 7), (2000, 391_136), (5, 5)])
def test_schedule_equals_open_clip(open_clip, warmup, total):
    from open_clip_train.scheduler import cosine_lr

    class Optimizer:
        param_groups = [{"lr": 0.0}]

    theirs = cosine_lr(Optimizer(), 4e-4, warmup, total)
    config = OptimConfig(lr=4e-4, warmup=warmup)
    steps = range(total) if total < 1000 else range(0, total, 997)
    for step in steps:
        assert learning_rate(step, total=total, config=config) == pytest.approx(theirs(step), rel=1e-12)


def test_ends_at_zero():
    config = OptimConfig(lr=1.0, warmup=0)
    assert learning_rate(0, total=10, config=config) == 1.0
    assert learning_rate(10, total=10, config=config) == pytest.approx(0, abs=1e-12)


def test_groups_hold_every_parameter_once():
    with torch.device("meta"):
        model = CLIP(PRESETS["ViT-S-16-worldwide"])
    named = dict(model.named_parameters())
    decayed, others = parameter_groups(named.items(), OptimConfig(weight_decay=0.1))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    ids = [id(p) for group in (decayed, others) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in named.values())
    assert {name for name, p in named.items() if p.ndim < 2} == {
        name for name, p in named.items() if not decays(name, p)
    }
    assert decays("text.token_embedding.weight", named["text.token_embedding.weight"])
    assert decays("vision.positional_embedding", named["vision.positional_embedding"])
