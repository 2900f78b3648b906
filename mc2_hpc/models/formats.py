"""Detecting the format of a model folder: ours, open_clip's or transformers'."""

from enum import StrEnum
from pathlib import Path
from typing import Any

from mc2_hpc.errors import UserError
from mc2_hpc.models.weights import is_checkpoint
from mc2_hpc.reading.json_file import read_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_CONFIG = "config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Format(StrEnum):
    """A model format, by its name in ``mc2 convert --to``."""

    OURS = "mc2"
    OPEN_CLIP = "open_clip"
    TRANSFORMERS = "hf"


def detect_format(source: Path) -> Format:
    """The format of ``source``: a checkpoint or run folder of ours, or a folder of one of the two libraries.

    Raises:
        UserError: there is nothing, or none of these.
    """
    if is_checkpoint(source):
        # Checked first, because a run folder may contain other files too.
        return Format.OURS
    if not source.exists():
        raise UserError(f"{source}: no such folder")
    if source.is_file():
        if is_pickle(source):
            raise refused_pickle(source)
        raise UserError(f"{source}: is a file; name the folder that holds the model")
    if (source / OPEN_CLIP_CONFIG).is_file():
        return Format.OPEN_CLIP
    path = source / TRANSFORMERS_CONFIG
    if path.is_file() and "model_type" in read_json(path, dict[str, Any]):
        return Format.TRANSFORMERS
    raise UserError(
        f"{source}: no model there (looked for model.json, latest, checkpoints/latest of a run, "
        f"{OPEN_CLIP_CONFIG}, and {TRANSFORMERS_CONFIG} of transformers)"
    )


def is_pickle(path: Path) -> bool:
    """Whether ``path`` has the suffix of a file written by torch.save."""
    return path.suffix in _PICKLES


def refused_pickle(path: Path) -> UserError:
    """The error for a pickled file, which could run code when read."""
    return UserError(
        f"{path}: pickled weights are not read, they can run code; if you trust the file, save it as safetensors: "
        f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), 'model.safetensors')"
    )
