"""A resumed run: what must not change, what may change with a warning, and what may change silently."""

import dataclasses
import functools
import json
import logging

import pytest

from mc2_hpc.config import config_from_dict, config_to_dict, load_config
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.models.presets import resolve
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, read_card, write_card
from mc2_hpc.training.checkpoint import Checkpoint
from mc2_hpc.training.freezing import adapters_of
from mc2_hpc.training.optim import learning_rate
from mc2_hpc.training.resume import ADDED, FIXED, SAID, SCHEDULE, check_resume, report_changes, teacher_changes
from tests.faults.tiny_run import write_config


@pytest.fixture
def resume(tiny_pool, tmp_path):
    """``resume(*overrides, tokenizer=..., style=...)``: the changes since a checkpoint after 8 of 8 steps."""
    values = {"steps": 8, "optim": {"lr": 1e-3, "warmup": 2}}
    path = write_config(tmp_path / "run.yaml", tiny_pool, **values)
    before = load_config(path)
    folder = tmp_path / "step-00000008"
    folder.mkdir()
    write_card(folder, ModelCard(arch=resolve(before.model), tokenizer_style="xlmv"))
    (folder / TOKENIZER_FILE).write_bytes(tiny_pool.tokenizer.read_bytes())
    saved = json.loads(json.dumps(config_to_dict(before)))  # as in trainer.json
    checkpoint = Checkpoint(folder=folder, trainer={"step": 8, "config": saved})

    def compare(*overrides, tokenizer=tiny_pool.tokenizer, style="xlmv", config=None, lora=None, **arch):
        now = config or load_config(path, list(overrides))
        card = ModelCard(arch=dataclasses.replace(resolve(now.model), **arch), tokenizer_style=style, lora=lora)
        return check_resume(checkpoint, now, card, Tokenizer(tokenizer, "xlmv"))

    compare.checkpoint = checkpoint
    compare.load = lambda *overrides: load_config(path, list(overrides))
    return compare


def test_every_key_of_the_table_is_a_setting(tiny_pool, tmp_path):
    """No key is in both tables, and a renamed setting fails here."""
    path = write_config(tmp_path / "run.yaml", tiny_pool, distill={"teacher": "runs/teacher"})
    config = config_to_dict(load_config(path))
    for key in (*FIXED, *SAID, *ADDED):
        found = config
        for part in key.split("."):
            assert part in found, key
            found = found[part]
    assert not set(FIXED) & set(SAID) and set(SCHEDULE) | (set(ADDED) - set(FIXED)) <= set(SAID)


def test_the_same_settings_warn_of_nothing(resume):
    assert resume() == []


@pytest.mark.parametrize(
    "override",
    [
        "output=elsewhere",
        "log_every=3",
        "micro_batch=4",
        "zero.stage=3",
        "model.embedding=dense",
        "model.recompute=selective",
        "data.workers=2",
        "checkpoint.every=7",
        "seed=9",
    ],
)
def test_what_changes_only_speed_is_silent(resume, override):
    assert resume(override) == []


def test_a_checkpoint_from_before_recompute_resumes(resume):
    """Its config has ``model.activation_checkpointing``."""
    model = resume.checkpoint.trainer["config"]["model"]
    del model["recompute"]
    model["activation_checkpointing"] = True
    assert resume() == resume("model.recompute=full") == []


def test_a_run_may_get_and_lose_its_teacher(resume):
    lines = ["distill.teacher None -> old", "distill.weight None -> 1.0", "distill.scale None -> 200.0"]
    assert resume("distill.teacher=old") == lines
    resume.checkpoint.trainer["config"]["distill"] = {"teacher": "old", "weight": 1.0, "scale": 200.0, "micro_batch": 0}
    assert resume("distill={teacher: old, micro_batch: 8}") == []
    assert resume("distill={teacher: new, weight: 2}") == ["distill.teacher old -> new", "distill.weight 1.0 -> 2.0"]
    assert resume()[0] == "distill.teacher old -> None"


@pytest.mark.parametrize(
    "override, line",
    [
        ("precision=bf16", "precision fp32 -> bf16"),
        ("global_batch=64", "global_batch 32 -> 64"),
        ("optim.beta2=0.5", "optim.beta2 0.95 -> 0.5"),
        ("data.crop_scale=[0.5,1.0]", "data.crop_scale [0.9, 1.0] -> [0.5, 1.0]"),
        ("optim.vision.lr_scale=0.5", "optim.vision.lr_scale 1.0 -> 0.5"),
        ("optim.text.layer_decay=0.9", "optim.text.layer_decay 1.0 -> 0.9"),
        ("optim.max_logit_scale=50", "optim.max_logit_scale 100.0 -> 50.0"),
        ("freeze.vision=1", "freeze.vision None -> 1"),
        ("freeze.logit_scale=true", "freeze.logit_scale False -> True"),
    ],
)
def test_what_may_change_is_reported(resume, override, line):
    assert resume(override) == [line]


def test_the_jump_of_the_learning_rate_is_reported(resume, caplog):
    lines = resume("steps=16")
    now = config_from_dict({"optim": {"lr": 1e-3, "warmup": 2}}).optim
    last, following = learning_rate(7, total=8, config=now), learning_rate(8, total=16, config=now)
    assert following > 9 * last
    assert lines == ["steps 8 -> 16", f"learning rate {last:.1e} in step 8 -> {following:.1e} in step 9"]
    with caplog.at_level(logging.WARNING):
        report_changes(resume.checkpoint, lines, resume.load())
    assert "not as in step-00000008: steps 8 -> 16" in caplog.text


def test_a_checkpoint_from_before_a_setting_resumes(resume):
    """Without a word, if the run behaves as it did."""
    config = resume.checkpoint.trainer["config"]
    for key in ADDED:
        *sections, name = key.split(".")
        del functools.reduce(dict.get, sections, config)[name]
    assert resume() == []
    del config["freeze"]
    assert resume("freeze.vision=1", "freeze.logit_scale=true") == [
        "freeze.vision None -> 1",
        "freeze.logit_scale False -> True",
    ]


@pytest.mark.parametrize(
    "before, override, key",
    [
        ({"vision": "all"}, "freeze.vision=2", "freeze.vision=all"),
        ({"text": "1"}, "freeze.text=0", "freeze.text=1"),
        ({"text": "0"}, "freeze.vision=all", "freeze.text=0"),
        ({"logit_scale": True}, "freeze.vision=1", "freeze.logit_scale=true"),
    ],
)
def test_what_was_frozen_stays_frozen(resume, before, override, key):
    """Its weights have no moments in the checkpoint."""
    resume.checkpoint.trainer["config"]["freeze"].update(before)
    with pytest.raises(
        UserError, match="keep .*, or start a new run from its weights: model.init_from=.*step-0"
    ) as error:
        resume(override)
    assert f"trained with {key}," in str(error.value)


@pytest.mark.parametrize(
    "before, overrides, words",
    [
        (
            None,
            ["lora.rank=4"],
            "trained with no lora, now it is lora={rank: 4, alpha: 16.0, vision: true, text: true}",
        ),
        ({"rank": 4}, [], "trained with lora={rank: 4, alpha: 16.0, vision: true, text: true}, now it is no lora"),
        (
            {"rank": 4},
            ["lora.rank=4", "lora.alpha=8"],
            "alpha: 16.0, vision: true, text: true}, now it is lora={rank: 4, ",
        ),
    ],
)
def test_the_adapters_stay_as_they_are(resume, before, overrides, words):
    """Without them, or with another factor, the weights would be another model's."""
    if before is not None:
        card = read_card(resume.checkpoint.folder)
        adapters = adapters_of(config_from_dict({"lora": before}))
        write_card(resume.checkpoint.folder, dataclasses.replace(card, lora=adapters))
        assert resume("lora.rank=4", lora=adapters) == []
    with pytest.raises(UserError, match="start a new run from its weights, in which adapters are folded") as error:
        resume(*overrides, lora=adapters_of(resume.load(*overrides)))
    assert words in str(error.value)


def test_what_was_frozen_is_known_by_the_old_models_blocks(resume):
    """Two: in a model of one block, ``freeze.vision=2`` would mean nothing. Other blocks are found with the weights."""
    resume.checkpoint.trainer["config"]["freeze"]["vision"] = "2"
    with pytest.raises(UserError, match="trained with freeze.vision=2,"):
        resume("model.vision.layers=1")
    assert resume("model.vision.layers=3", "freeze.vision=2") == []
    resume.checkpoint.trainer["config"]["freeze"]["vision"] = "all"
    assert resume("model.vision.layers=1", "freeze.vision=all") == []


def test_another_teacher_behind_the_same_name_is_reported(resume):
    checkpoint = resume.checkpoint
    assert teacher_changes(checkpoint, "a" * 64) == []  # from before it was saved
    checkpoint.trainer["teacher"] = "a" * 64
    assert teacher_changes(checkpoint, "a" * 64) == []
    assert teacher_changes(checkpoint, "b" * 64) == [
        "SHA-256 of the teacher's files aaaaaaaaaaaa... -> bbbbbbbbbbbb..."
    ]


def test_what_the_stages_change_is_no_warning(resume, caplog):
    """But what someone changed at their border is one."""
    stages = "stages=[{steps: 8, data: {crop_scale: [0.5, 1.0]}}, {steps: 8, precision: bf16}]"
    resume.checkpoint.trainer["config"] = json.loads(json.dumps(config_to_dict(resume.load("steps=16", stages))))
    lines = resume("steps=16", stages)
    assert lines == ["precision fp32 -> bf16", "data.crop_scale [0.5, 1.0] -> [0.9, 1.0]"]
    report_changes(resume.checkpoint, lines, resume.load("steps=16", stages))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for override in ("optim.beta2=0.5", "model.vision.image_size=48"):
        report_changes(resume.checkpoint, lines, resume.load("steps=16", stages, override))
        assert "not as in step-00000008: precision fp32 -> bf16" in caplog.text
        caplog.clear()


def test_another_teacher_is_a_warning_in_a_run_with_stages_too(resume, caplog):
    resume.checkpoint.trainer.update(teacher="a" * 64)
    report_changes(resume.checkpoint, teacher_changes(resume.checkpoint, "b" * 64))
    assert "not as in step-00000008: SHA-256 of the teacher's files" in caplog.text


def test_another_schedule_is_reported(resume):
    lines = resume("steps=16", "optim.schedule=wsd", "optim.decay_steps=4")
    assert lines[:3] == ["steps 8 -> 16", "optim.schedule cosine -> wsd", "optim.decay_steps 0 -> 4"]
    assert lines[3].startswith("learning rate ") and lines[3].endswith(" -> 1.0e-03 in step 9")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"overrides": ["data.lanes=4"]}, "trained with data.lanes=8, now it is 4: the data order would not continue"),
        ({"overrides": ["data.seed=1"]}, "data.seed=0, now it is 1"),
        (
            {"overrides": ["optim.matrices=muon"]},
            "trained with optim.matrices=adamw, now it is muon: the checkpoint has",
        ),
        ({"overrides": ["model.text.heads=4"]}, "trained with model.text.heads=3, now it is 4"),
        ({"overrides": ["model.vision.head_width=16"]}, "model.vision.head_width=32, now it is 16"),
        ({"quick_gelu": True}, "model.quick_gelu=False, now it is True"),
        ({"style": "gemma"}, "data.tokenizer_style=xlmv, now it is gemma"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_must_not_change_is_refused(resume, change, words):
    """Heads and activation do not show in any weight's shape: the run would continue as another function."""
    with pytest.raises(UserError, match="keep .*, or start from scratch with another output") as error:
        resume(*change.pop("overrides", []), **change)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_another_tokenizer_of_the_same_size_is_refused(resume, tiny_pool, tmp_path):
    texts = [f"number {n % 3}, ground {n}, square a lime" for n in range(200)]
    other = train_tokenizer(texts, tmp_path / "other.model", vocab_size=40, style="xlmv").model_file
    with pytest.raises(UserError, match="other.model: not the tokenizer that .*step-00000008 was trained with"):
        resume(tokenizer=other)


def test_the_same_tokenizer_may_lie_elsewhere(resume, tiny_pool, tmp_path):
    copy = tmp_path / "copy.model"
    copy.write_bytes(tiny_pool.tokenizer.read_bytes())
    assert resume(f"data.tokenizer={copy}", tokenizer=copy) == []


def test_a_setting_that_an_older_version_did_not_have_is_reported(resume):
    del resume.checkpoint.trainer["config"]["optim"]["grad_clip"]
    assert resume() == ["optim.grad_clip None -> 0.0"]
