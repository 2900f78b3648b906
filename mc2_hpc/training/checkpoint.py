"""Checkpoints of a run: full tensors by parameter name in safetensors, written by all ranks, readable by any number.

    <run>/checkpoints/latest                     the newest complete checkpoint's name
    <run>/checkpoints/best.json                  name of the best checkpoint (which is kept), its metric and value
    <run>/checkpoints/step-00002000/
        model.json, tokenizer.model              architecture and tokenizer (mc2_hpc.models.weights)
        model.00000-of-00004.safetensors ...     fp32 weights, and adapters (mc2_hpc.models.lora) if the run trains such
        optimizer.00000-of-00004.safetensors ... AdamW moments, named <parameter>.<moment>
        ema.00000-of-00004.safetensors ...       fp32 moving average of the trained weights, if the run keeps one
        trainer.json                             step, samples seen, data position, config, versions
        manifest.json                            size and SHA-256 of every file above

DeepSpeed's own checkpoints are pickles tied to a world size and a ZeRO stage. These are neither, so one format serves
resuming with another world size, evaluation and conversion. ``mc2_hpc.training.saving`` writes them.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mc2_hpc.distributed import Ranks, on_first_rank
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.positions import IMAGE_POSITIONS, RESIZED, TEXT_POSITIONS, num_image_positions
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import check_names, read_card
from mc2_hpc.models.wrapped import UnwrappedTensorFiles
from mc2_hpc.reading.json_file import Count, File, Foreign, Sha256, read_fields, read_json
from mc2_hpc.storage import file_sha256
from mc2_hpc.training.checkpoint_folders import MANIFEST, TRAINER, complete_folders

logger = logging.getLogger(__name__)


class _Saved(File):
    """One file's entry in ``manifest.json``."""

    bytes: Count
    sha256: Sha256


class _SavedShards(File):
    count: Count
    sha256: Sha256


_SavedPlace = tuple[Count, Count, Count]
"""Epoch, shard and offset."""


class _SavedMix(File):
    draws: Count
    sources: dict[str, _SavedPlace]


SavedLane = _SavedPlace | _SavedMix
"""Position of a lane: its place or, in a mix, its place in each source."""


class _TrainerFile(Foreign):
    """The fields of ``trainer.json`` that resuming needs."""

    step: Count
    samples_seen: Count
    skipped: dict[str, Count]
    position: list[SavedLane]
    config: dict[str, Any]
    """Config of the run that wrote it; it may lack settings added since."""
    shards: _SavedShards | None = None
    sources: dict[str, _SavedShards] = {}
    """In place of ``shards`` in a mix."""
    teacher: Sha256 | None = None
    """Of the teacher's files."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint found on disk."""

    folder: Path
    trainer: dict[str, Any]
    """Contents of ``trainer.json``."""

    @property
    def step(self) -> int:
        """Number of steps trained."""
        return int(self.trainer["step"])


def newest_checkpoint(folder: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` whose files are all intact, or ``None`` if there are none. Collective.

    A damaged checkpoint is logged and the one before it is tried. ``latest`` is not used: it is for tools that read one
    model, and a run may have been killed between renaming a checkpoint and updating it.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    found: list[str | None] = [None]

    def find() -> None:
        found[0] = _newest_whole(folder)

    on_first_rank(ranks, find)
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return None
    return Checkpoint(folder=folder / found[0], trainer=read_trainer(folder / found[0]))


def read_trainer(folder: Path) -> dict[str, Any]:
    """Contents of the ``trainer.json`` of the checkpoint in ``folder``.

    Raises:
        UserError: it is missing or damaged.
    """
    return read_fields(folder / TRAINER, _TrainerFile)


def _newest_whole(folder: Path) -> str | None:
    folders = complete_folders(folder)
    for candidate in reversed(folders):
        damage = find_damage(candidate)
        if damage is None:
            return candidate.name
        logger.error("checkpoint %s is damaged (%s); trying the one before it", candidate, damage)
    if folders:
        raise UserError(f"{folder}: no intact checkpoint among {len(folders)}; move them away to start from scratch")
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, as text, or ``None`` if all match the manifest."""
    try:
        entries = read_json(folder / MANIFEST, dict[str, _Saved])
    except UserError as error:
        return f"{MANIFEST} cannot be read: {error}"
    if TRAINER not in entries:
        return f"{MANIFEST} does not list {TRAINER}"
    for name, saved in sorted(entries.items()):
        path = folder / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != saved.bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {saved.bytes}"
        if file_sha256(path) != saved.sha256:
            return f"{name} does not match its SHA-256"
    return None


def load_weights(clip: CLIP, folder: Path) -> None:
    """Copy a checkpoint's weights into ``clip``, tables of positions as :func:`copy_weights` does.

    Raises:
        UserError: they belong to another model.
    """
    copy_weights(clip, UnwrappedTensorFiles(folder, "model"), read_card(folder).arch, str(folder))


def copy_weights(clip: CLIP, files: TensorFiles, stored: ClipArchitecture, source: str) -> None:
    """Copy weights of the architecture ``stored`` into ``clip``, with tables of positions interpolated to its image
    size and context length. A ``logit_bias`` that only one of them has is left out, or starts as in a new model.

    Raises:
        UserError: they belong to another model; the message begins with ``source``.
    """
    state = clip.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    rows = {IMAGE_POSITIONS: num_image_positions(stored), TEXT_POSITIONS: stored.text.context_length}
    tables = {name: torch.Size((num_rows, shapes[name][1])) for name, num_rows in rows.items()}
    expected = {**shapes, **tables}
    if stored.logit_bias:
        expected["logit_bias"] = torch.Size(())
    else:
        expected.pop("logit_bias", None)
    check_names(source, files.names(), expected, files)
    for name, tensor in state.items():
        if name not in expected:
            continue
        weight = files.get_fp32(name)
        tensor.copy_(RESIZED[name](weight, tensor.shape[0]) if name in RESIZED else weight)
