"""Checkpoints of a run: whole tensors by parameter name in safetensors, written by all ranks, readable by any number.

    <run>/checkpoints/latest                     the newest complete checkpoint's name
    <run>/checkpoints/step-00002000/
        model.json, tokenizer.model              what the weights are (mc2_hpc.models.weights)
        model.00000-of-00004.safetensors ...     fp32 weights
        optimizer.00000-of-00004.safetensors ... AdamW moments, named <parameter>.<moment>
        trainer.json                             step, samples seen, data position, config, versions
        manifest.json                            size and SHA-256 of every file above

DeepSpeed's own checkpoints are pickles tied to a number of ranks and a ZeRO stage; these are neither, so one format
serves resuming on other ranks, evaluation and conversion. A checkpoint is written to a temporary folder, fsynced,
renamed, and only then named by ``latest``.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mc2_hpc.distributed import Ranks, first_error
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, TensorFiles, check_names, write_card, write_tensors
from mc2_hpc.storage import (
    atomic_path,
    file_sha256,
    fsync_file,
    fsync_folder,
    read_json,
    remove_folder,
    write_json,
)
from mc2_hpc.training.engine import Engine

logger = logging.getLogger(__name__)

_MAX_WRITERS = 32
_TRAINER, _MANIFEST, _LATEST = "trainer.json", "manifest.json", "latest"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint found on disk."""

    folder: Path
    trainer: dict[str, Any]
    """What ``trainer.json`` says."""

    @property
    def step(self) -> int:
        """Steps trained."""
        return int(self.trainer["step"])


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int) -> None:
        self.folder = folder
        self._ranks = ranks
        self._keep = keep

    def save(
        self, engine: Engine, *, step: int, card: ModelCard, tokenizer_file: Path, trainer: dict[str, Any]
    ) -> Path:
        """Save the engine's state after ``step`` steps. Collective.

        Raises:
            Exception: any rank failed to write; every rank raises, the older checkpoints are untouched.
        """
        name = f"step-{step:08d}"
        temporary = self.folder / f".{name}.partial"
        error: Exception | None = None
        try:
            if self._ranks.is_first:
                remove_folder(temporary)
                temporary.mkdir(parents=True)
        except Exception as failure:  # whatever it is, the other ranks must hear of it
            error = failure
        first_error(error)
        mine = _collect_share(engine, self._ranks.rank, min(self._ranks.world_size, _MAX_WRITERS))
        entries: dict[str, Any] = {}
        try:
            for path in _write_share(temporary, mine, self._ranks):
                entries[path.name] = _manifest_entry(path)
            if self._ranks.is_first:
                shutil.copyfile(tokenizer_file, temporary / TOKENIZER_FILE)
                fsync_file(temporary / TOKENIZER_FILE)
                write_card(temporary, card)
                write_json(temporary / _TRAINER, {**trainer, "step": step})
                for path in (temporary / TOKENIZER_FILE, temporary / "model.json", temporary / _TRAINER):
                    entries[path.name] = _manifest_entry(path)
        except Exception as failure:  # whatever it is, the other ranks must hear of it
            error = failure
        first_error(error)
        all_entries: list[dict[str, Any]] = [{} for _ in range(self._ranks.world_size)]
        dist.all_gather_object(all_entries, entries)
        try:
            if self._ranks.is_first:
                write_json(temporary / _MANIFEST, {k: v for part in all_entries for k, v in part.items()})
                self._publish(temporary, name)
        except Exception as failure:  # whatever it is, the other ranks must hear of it
            error = failure
        first_error(error)
        return self.folder / name

    def _publish(self, temporary: Path, name: str) -> None:
        final = self.folder / name
        fsync_folder(temporary)
        remove_folder(final)
        temporary.rename(final)
        fsync_folder(self.folder)
        with atomic_path(self.folder / _LATEST) as path:
            path.write_text(name + "\n", encoding="utf-8")
        for old in self._complete_folders()[: -self._keep]:
            remove_folder(old)
        for leftover in self.folder.glob(".step-*.partial"):
            remove_folder(leftover)

    def _complete_folders(self) -> list[Path]:
        """Renamed checkpoint folders, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / _MANIFEST).is_file())

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose every file is whole, or ``None`` if the run has none. Collective.

        A damaged checkpoint is reported in the log and the one before it is taken.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        found: list[str | None] = [None]
        error: Exception | None = None
        if self._ranks.is_first:
            try:
                found = [self._newest_whole()]
            except UserError as failure:
                error = failure
        first_error(error)
        dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            return None
        folder = self.folder / found[0]
        return Checkpoint(folder=folder, trainer=read_json(folder / _TRAINER))

    def _newest_whole(self) -> str | None:
        folders = self._complete_folders()
        for folder in reversed(folders):
            damage = find_damage(folder)
            if damage is None:
                return folder.name
            logger.error("checkpoint %s is damaged (%s); trying the one before it", folder, damage)
        if folders:
            raise UserError(
                f"{self.folder}: none of the {len(folders)} checkpoints is whole; move them away to start anew"
            )
        return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in words, or ``None`` if all match their manifest."""
    manifest = read_json(folder / _MANIFEST)
    for name, entry in sorted(manifest.items()):
        path = folder / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if file_sha256(path) != entry["sha256"]:
            return f"{name} does not match its SHA-256"
    return None


def load_weights(clip: CLIP, folder: Path) -> None:
    """Copy a checkpoint's weights into ``clip``.

    Raises:
        UserError: they are another model's.
    """
    files = TensorFiles(folder, "model")
    state = clip.state_dict()
    check_names(str(folder), files.names(), {name: tensor.shape for name, tensor in state.items()}, files)
    for name, tensor in state.items():
        tensor.copy_(files.get(name))


def _manifest_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _collect_share(engine: Engine, rank: int, num_writers: int) -> dict[str, dict[str, Tensor]]:
    """Go through the whole state and keep what this rank writes, on the CPU: {file prefix: {name: tensor}}."""
    owner = _owners(engine, num_writers)
    share: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for kind, name, tensor in engine.state():
        if owner[kind, name] == rank:
            prefix, key = ("model", name) if kind == "weight" else ("optimizer", f"{name}.{kind}")
            share[prefix][key] = tensor.to("cpu", torch.float32, copy=True)
    return share


def _owners(engine: Engine, num_writers: int) -> dict[tuple[str, str], int]:
    """Which writer gets which tensor: largest first, each to the writer with the least so far."""
    load = [0] * num_writers
    owners = {}
    entries = [(engine.state_shape(name).numel(), kind, name) for kind, name in engine.state_names()]
    for numel, kind, name in sorted(entries, reverse=True):
        writer = min(range(num_writers), key=lambda w: load[w])
        owners[kind, name] = writer
        load[writer] += numel
    return owners


def _write_share(folder: Path, share: dict[str, dict[str, Tensor]], ranks: Ranks) -> list[Path]:
    num_writers = min(ranks.world_size, _MAX_WRITERS)
    if ranks.rank >= num_writers:
        return []
    paths = []
    for prefix, tensors in share.items():
        path = folder / f"{prefix}.{ranks.rank:05d}-of-{num_writers:05d}.safetensors"
        write_tensors(path, tensors)
        paths.append(path)
    return paths
