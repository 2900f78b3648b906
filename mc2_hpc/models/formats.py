"""Detecting the format of a model folder: ours, open_clip's, transformers' or an ONNX export."""

from enum import StrEnum
from pathlib import Path
from typing import Any

from mc2_hpc.errors import UserError
from mc2_hpc.models.weights import is_checkpoint
from mc2_hpc.reading.json_file import read_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_CONFIG = "config.json"
ONNX_CONFIG = "onnx_model.json"


class Format(StrEnum):
    """A model format, by its name in ``mc2 convert --to``."""

    OURS = "mc2"
    OPEN_CLIP = "open_clip"
    TRANSFORMERS = "hf"
    ONNX = "onnx"


def detect_format(source: Path) -> Format:
    """The format of ``source``: our checkpoint or run folder, a folder of open_clip or transformers, or an ONNX export.

    Raises:
        UserError: there is nothing, or none of these.
    """
    if is_checkpoint(source):
        # Checked first, because a run folder may contain other files too.
        return Format.OURS
    if not source.exists():
        raise UserError(f"{source}: no such folder")
    if source.is_file():
        raise UserError(
            f"{source}: is a file; name the folder that holds the model: its weights, its tokenizer, and "
            f"{OPEN_CLIP_CONFIG} or {TRANSFORMERS_CONFIG}"
        )
    if (source / OPEN_CLIP_CONFIG).is_file():
        return Format.OPEN_CLIP
    if (source / ONNX_CONFIG).is_file():
        return Format.ONNX
    path = source / TRANSFORMERS_CONFIG
    if path.is_file() and "model_type" in read_json(path, dict[str, Any]):
        return Format.TRANSFORMERS
    raise UserError(
        f"{source}: no model there (looked for model.json, latest, checkpoints/latest of a run, "
        f"{OPEN_CLIP_CONFIG}, {ONNX_CONFIG}, and {TRANSFORMERS_CONFIG} of transformers)"
    )
