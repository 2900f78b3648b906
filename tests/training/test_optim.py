"""Learning-rate schedule and AdamW groups, compared with open_clip's."""

import pytest
import torch

from mc2_hpc.config import OptimConfig, config_from_dict
from mc2_hpc.config_optim import TowerOptimConfig
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.presets import PRESETS
from mc2_hpc.training.optim import decays, learning_rate, parameter_groups, set_learning_rate


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


@pytest.mark.parametrize("warmup, decay, total", [(10, 20, 100), (0, 1, 7), (5, 7, 7), (2000, 39_114, 391_136)])
def test_constant_schedules_equal_open_clip(open_clip, warmup, decay, total):
    from open_clip_train.scheduler import const_lr, const_lr_cooldown

    class Optimizer:
        param_groups = [{"lr": 0.0}]

    stable = const_lr(Optimizer(), 4e-4, warmup, total)
    falling = const_lr_cooldown(Optimizer(), 4e-4, warmup, total, decay, 1.0, 0.0)
    constant = OptimConfig(lr=4e-4, warmup=warmup, schedule="constant")
    wsd = OptimConfig(lr=4e-4, warmup=warmup, schedule="wsd", decay_steps=decay)
    for step in range(total) if total < 1000 else [*range(0, total, 997), total - 1]:
        assert learning_rate(step, total=total, config=constant) == pytest.approx(stable(step), rel=1e-12)
        assert learning_rate(step, total=total, config=wsd) == pytest.approx(falling(step), rel=1e-12)


def test_more_steps_change_nothing_before_the_decay():
    """Warm-up-stable-decay: a run that is given more steps before it decays continues as if it had always had them."""
    config = OptimConfig(warmup=3, schedule="wsd", decay_steps=4)
    short, long = ([learning_rate(step, total=total, config=config) for step in range(20)] for total in (20, 40))
    assert short[:17] == long[:17] and short[17] < long[17]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"schedule": "linear"}, "choose one of cosine, constant, wsd"),
        ({"schedule": "wsd"}, "optim.decay_steps=0 with optim.schedule=wsd: set a number of steps"),
        ({"decay_steps": 5}, "optim.decay_steps=5 with optim.schedule=cosine: .* 0 for the others"),
        ({"matrices": "sgd"}, "choose one of adamw, muon"),
        ({"matrices": "muon", "muon_momentum": 1.0}, r"optim.muon_momentum=1.0: must be in \[0, 1\)"),
        ({"max_logit_scale": 101.0}, r"optim.max_logit_scale=101.0: must be in \[1, 100\]"),
        ({"text": {"lr_scale": 0.0}}, "optim.text.lr_scale=0.0: must be above 0; to train nothing, set freeze.text"),
        ({"vision": {"layer_decay": -1.0}}, "optim.vision.layer_decay=-1.0: must be above 0"),
    ],
)
def test_settings_that_cannot_be(values, words):
    with pytest.raises(UserError, match=words):
        config_from_dict({"optim": values})


@pytest.mark.parametrize(
    "other, words",
    [({"zero": {"stage": 3}}, "Muon needs whole matrices"), ({"lora": {}}, "Muon is for the matrices themselves")],
)
def test_what_muon_cannot_train_is_refused(other, words):
    with pytest.raises(UserError, match=words):
        config_from_dict({"optim": {"matrices": "muon"}, **other})


def test_a_decay_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="optim.decay_steps=11: the run has only 10 steps"):
        config_from_dict({"steps": 10, "optim": {"schedule": "wsd", "decay_steps": 11}})


def meta_model(preset="ViT-S-16-worldwide"):
    with torch.device("meta"):
        return CLIP(PRESETS[preset])


def test_groups_hold_every_parameter_once():
    model = meta_model()
    named = dict(model.named_parameters())
    decayed, others = parameter_groups(named.items(), model.arch, OptimConfig(weight_decay=0.1))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    ids = [id(p) for group in (decayed, others) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in named.values())
    assert {name for name, p in named.items() if p.ndim < 2} == {
        name for name, p in named.items() if not decays(name, p)
    }
    assert decays("text.token_embedding.weight", named["text.token_embedding.weight"])
    assert decays("vision.positional_embedding", named["vision.positional_embedding"])


def test_groups_of_learning_rates():
    model = meta_model()
    layers = model.arch.vision.layers
    config = OptimConfig(vision=TowerOptimConfig(lr_scale=0.5, layer_decay=0.9), text=TowerOptimConfig(lr_scale=2.0))
    model.vision.norm_pre.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), model.arch, config)
    decayed = [group["weight_decay"] > 0 for group in groups]
    assert decayed == sorted(decayed, reverse=True)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {named[id(p)]: group["lr_factor"] for group in groups for p in group["params"]}
    assert found.keys() == {name for name in named.values() if "norm_pre" not in name}
    assert found["logit_scale"] == 1
    assert {factor for name, factor in found.items() if name.startswith("text.")} == {2.0}
    assert found["vision.projection"] == found["vision.norm_post.bias"] == 0.5
    assert found[f"vision.transformer.blocks.{layers - 1}.fc.weight"] == pytest.approx(0.5 * 0.9)
    assert found["vision.transformer.blocks.0.fc.bias"] == pytest.approx(0.5 * 0.9**layers)
    assert found["vision.class_embedding"] == pytest.approx(0.5 * 0.9 ** (layers + 1))
    set_learning_rate(groups, 1e-3)
    assert {group["lr"] for group in groups} == {1e-3 * factor for factor in found.values()}
