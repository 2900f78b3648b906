"""What a resumed run may change: tables of settings to compare with those of the checkpoint.

Settings in neither table (folders, logging, saving, the rest of ZeRO, the kind of token table, backends, workers, ...)
affect only speed and rounding, and may change silently.
"""

import logging
from collections.abc import Mapping
from typing import Any

from mc2_hpc.config import RunConfig, config_from_dict, config_to_dict
from mc2_hpc.config_stages import RunStage, run_stages, stage_after
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.models.positions import describe_resizing
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, read_card
from mc2_hpc.storage import file_sha256
from mc2_hpc.training.checkpoint import Checkpoint
from mc2_hpc.training.freezing import frozen_depths
from mc2_hpc.training.optim import stage_learning_rate
from mc2_hpc.training.resume_sources import source_changes

logger = logging.getLogger(__name__)

_ORDER = "the data order would not continue"
_MEANING = "the weights would be interpreted as another model's"
FIXED = {
    "data.lanes": _ORDER,
    "data.seed": _ORDER,
    "model.quick_gelu": _MEANING,
    "model.vision.head_width": _MEANING,
    "model.text.heads": _MEANING,
    "model.text.eos_id": _MEANING,
    "model.text.context_length": "only model.init_from interpolates the text tower's positions",
    "data.tokenizer_style": _MEANING,
    "optim.matrices": "the checkpoint has another optimizer's state",
    "loss.kind": "the model would lose or lack its logit_bias",
}
"""Settings that must not change, with the reason. Sizes are listed only if no weight's shape depends on them; the
others are checked when the weights are loaded. The content of ``data.tokenizer`` must not change either."""

SAID = (
    "steps",
    "global_batch",
    "precision",
    "fp8_min_size",
    "zero.reduce_dtype",
    "model.patch_dropout",
    "freeze.vision",
    "freeze.text",
    "freeze.logit_scale",
    "optim.lr",
    "optim.warmup",
    "optim.schedule",
    "optim.decay_steps",
    "optim.vision.lr_scale",
    "optim.vision.layer_decay",
    "optim.text.lr_scale",
    "optim.text.layer_decay",
    "optim.max_logit_scale",
    "optim.ema_decay",
    "optim.beta1",
    "optim.beta2",
    "optim.eps",
    "optim.weight_decay",
    "optim.grad_clip",
    "optim.muon_momentum",
    "data.train",
    "data.balance",
    "data.crop_scale",
    "data.takedown",
    "data.features",
    "distill.teacher",
    "distill.features",
    "distill.weight",
    "distill.scale",
)
"""Settings that may change with a warning each: training continues, but differently from here on. More may be frozen,
but not less: what was frozen has no AdamW state in the checkpoint."""

ADDED: dict[str, Any] = {
    "fp8_min_size": 1024,
    "loss.kind": "softmax",
    "zero.reduce_dtype": "fp32",
    "model.patch_dropout": 0.0,
    "freeze.logit_scale": False,
    "optim.matrices": "adamw",
    "optim.muon_momentum": 0.95,
    "optim.schedule": "cosine",
    "optim.decay_steps": 0,
    "optim.vision.lr_scale": 1.0,
    "optim.vision.layer_decay": 1.0,
    "optim.text.lr_scale": 1.0,
    "optim.text.layer_decay": 1.0,
    "optim.max_logit_scale": 100.0,
    "optim.ema_decay": 0.0,
}
"""Settings that older versions did not have, and the value that they behaved as; not listed if that is null."""

SCHEDULE = ("steps", "optim.lr", "optim.warmup", "optim.schedule", "optim.decay_steps")
"""Those of them that set the learning rate; a warning also shows its jump."""


def check_resume(checkpoint: Checkpoint, config: RunConfig, card: ModelCard, tokenizer: Tokenizer) -> list[str]:
    """Allowed differences between the step that wrote the checkpoint and the next one, one line each.

    Args:
        config: of the whole run.
        card, tokenizer: of this start.

    Raises:
        UserError: something differs that must not.
    """
    old_stage, stage = _stage_before(checkpoint), stage_after(config, checkpoint.step)
    before = checkpoint.trainer["config"] if old_stage is None else config_to_dict(old_stage.config)
    now = config_to_dict(stage.config)
    old_card = read_card(checkpoint.folder)
    for key, why in FIXED.items():
        if key.startswith("model."):
            values = [_lookup(_nested(each), key.removeprefix("model.")) for each in (old_card, card)]
        elif key == "data.tokenizer_style":
            values = [old_card.tokenizer_style, card.tokenizer_style]
        else:
            values = [_lookup(before, key, ADDED.get(key)), _lookup(now, key)]
        if values[0] != values[1]:
            raise UserError(
                f"{checkpoint.folder}: trained with {key}={values[0]}, now it is {values[1]}: {why}; "
                f"keep {values[0]}, or start from scratch with another output"
            )
    own = checkpoint.folder / TOKENIZER_FILE
    if own.is_file() and file_sha256(own) != file_sha256(tokenizer.model_file):
        raise UserError(
            f"{tokenizer.model_file}: not the tokenizer that {checkpoint.folder} was trained with: captions would map "
            f"to other rows of the token table; set data.tokenizer={own}, or start from scratch with another output"
        )
    _check_frozen(checkpoint, stage.config, old=old_card.arch, new=card.arch)
    _check_adapters(checkpoint, old_card, card)
    pairs = {key: (_lookup(before, key, ADDED.get(key)), _lookup(now, key)) for key in SAID}
    changed = [key for key, (old, new) in pairs.items() if old != new]
    lines = describe_resizing(old_card.arch, card.arch)
    for key in changed:
        old, new = pairs[key]
        lines += source_changes(old, new) if key == "data.train" else [f"{key} {old} -> {new}"]
    if set(changed) & set(SCHEDULE):
        lines.append(_jump(checkpoint, before, old_stage, stage))
    return lines


def teacher_changes(checkpoint: Checkpoint, identity: str) -> list[str]:
    """Whether the teacher is another model than that of the run that wrote the checkpoint, in one line or none.

    Args:
        identity: SHA-256 of the teacher (:attr:`DistillationTeacher.identity`).
    """
    before = checkpoint.trainer.get("teacher")
    if before is None or before == identity:
        return []
    return [f"SHA-256 of the teacher's files {before[:12]}... -> {identity[:12]}..."]


def report_changes(checkpoint: Checkpoint, lines: list[str], config: RunConfig | None = None) -> None:
    """Log differences from the run that wrote a checkpoint: a warning each, unless the run's stages are their cause.

    Args:
        config: of the whole run; ``None`` if they cannot be.
    """
    as_planned = config is not None and _as_planned(checkpoint, config)
    for line in lines:
        if as_planned:
            logger.info("from here on: %s", line)
        else:
            logger.warning("not as in %s: %s", checkpoint.folder.name, line)


def _as_planned(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Whether all that a warning is about was planned in the checkpoint's run, which has the same stages."""
    if not config.stages or not checkpoint.trainer["config"].get("stages"):
        return False
    # Typed, because JSON has no tuples.
    planned = config_to_dict(config_from_dict(checkpoint.trainer["config"], source=str(checkpoint.folder)))
    now = config_to_dict(config)
    return all(_lookup(planned, key) == _lookup(now, key) for key in (*SAID, "stages", "model.vision"))


def _stage_before(checkpoint: Checkpoint) -> RunStage[RunConfig] | None:
    """The stage that trained a checkpoint's last step; None if its run has none."""
    before = checkpoint.trainer["config"]
    if not before.get("stages"):
        return None
    return stage_after(config_from_dict(before, source=str(checkpoint.folder)), checkpoint.step - 1)


def _check_frozen(checkpoint: Checkpoint, config: RunConfig, *, old: ClipArchitecture, new: ClipArchitecture) -> None:
    """Check that nothing that was frozen is trained now. Numbers of blocks that differ are for :func:`load_weights`."""
    source = str(checkpoint.folder)
    values = checkpoint.trainer["config"].get("freeze", {})
    before = config_from_dict({"freeze": values}, source=source).freeze
    depths = frozen_depths(old, before), frozen_depths(new, config.freeze)
    thawed = [
        f"freeze.{tower}"
        for tower in ("vision", "text")
        if depths[1][tower] < depths[0][tower] and getattr(before, tower) != getattr(config.freeze, tower)
    ]
    if before.logit_scale and not config.freeze.logit_scale:
        thawed.append("freeze.logit_scale")
    for key in thawed:
        value = str(_lookup({"freeze": values}, key)).lower()
        raise UserError(
            f"{source}: trained with {key}={value}, so it has no AdamW state of what is to be trained now; "
            f"keep {value}, or start a new run from its weights: model.init_from={source} with another output"
        )


def _check_adapters(checkpoint: Checkpoint, before: ModelCard, now: ModelCard) -> None:
    if before.lora != now.lora:
        old, new = (str(card.lora or "no lora") for card in (before, now))
        raise UserError(
            f"{checkpoint.folder}: trained with {old}, now it is {new}: keep it, or start a new run from its weights, "
            f"in which adapters are folded: model.init_from={checkpoint.folder} with another output"
        )


def _jump(
    checkpoint: Checkpoint, before: Mapping[str, Any], old_stage: RunStage[RunConfig] | None, stage: RunStage[RunConfig]
) -> str:
    step = checkpoint.step
    if old_stage is None:
        values = {key: before[key] for key in ("steps", "optim") if key in before}
        (old_stage,) = run_stages(config_from_dict(values, source=str(checkpoint.folder)))
    last, following = stage_learning_rate(step - 1, old_stage), stage_learning_rate(step, stage)
    return f"learning rate {last:.1e} in step {step} -> {following:.1e} in step {step + 1}"


def _nested(card: ModelCard) -> dict[str, Any]:
    """A card's architecture as nested mappings."""
    arch = card.arch
    return {**vars(arch), "vision": vars(arch.vision), "text": vars(arch.text)}


def _lookup(values: Mapping[str, Any], key: str, missing: Any = None) -> Any:
    """The value of a dotted key, or ``missing``; tuples become lists, as in JSON."""
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return missing
        found = found[part]
    return list(found) if isinstance(found, tuple) else found
