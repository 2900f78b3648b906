"""Writing checkpoints (``mc2_hpc.training.checkpoint``) while training continues.

A save has three parts. *Copy*: every rank copies its share of the state to host memory; training waits for that.
*Write*: a thread of every rank writes, fsyncs and hashes the copies in a hidden folder. *Publish*: once all ranks have
written, a thread of the first rank adds the manifest, renames the folder and only then points ``latest`` at it.

Threads never communicate. Ranks learn that all have written from a vote in the training step's own all-reduce, and
exchange hashes in their main threads between two steps. A run killed before the rename leaves the older checkpoints
untouched.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mc2_hpc.distributed import Ranks
from mc2_hpc.errors import UserError
from mc2_hpc.models.average import AVERAGE
from mc2_hpc.models.weights import BEST, TOKENIZER_FILE, ModelCard, read_best, write_card, write_tensors
from mc2_hpc.storage import atomic_path, file_sha256, fsync_file, fsync_folder, remove_folder, write_json
from mc2_hpc.training.checkpoint_folders import LATEST, MANIFEST, TRAINER, complete_folders
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.tower_state import EMA

logger = logging.getLogger(__name__)

_MAX_WRITERS = 32
_WAIT_S = 600
"""Longest wait for the files of one part of a save; after it, the storage counts as dead and the run ends."""

_Entries = dict[str, dict[str, Any]]


class CheckpointWriter:
    """Saves into the checkpoints folder of one run, one save at a time.

    Every method is collective; :attr:`busy`, :attr:`step` and :attr:`failure` are the same on all ranks.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int, newest: int = -1) -> None:
        """
        Args:
            newest: step of the complete checkpoint that the run resumes from; -1: it starts from scratch.
        """
        self.folder = folder
        self.step = newest
        """Step of the newest save."""
        self.failure: str | None = None
        """Why the newest save failed."""
        self._ranks = ranks
        self._num_writers = min(ranks.world_size, _MAX_WRITERS)
        self._keep = keep
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._phase: str | None = None
        self._task: _Task | None = None
        self._waited = 0.0
        if ranks.is_first:
            self._remove_partial("*")  # left half-written or half-removed by a killed run

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._phase is not None

    @property
    def own_part_done(self) -> bool:
        """This rank's vote on :meth:`advance`: once all ranks vote yes, it does not have to wait for any files."""
        return self.busy and (self._task is None or not self._task.runs())

    def begin(
        self, engine: Engine, *, step: int, card: ModelCard, tokenizer_file: Path, trainer: dict[str, Any]
    ) -> None:
        """Copy the engine's state after ``step`` steps and start writing it; finishes a save in progress first."""
        self.finish()
        begin = time.perf_counter()
        self.step, self.failure, self._phase = step, None, "write"
        share = self._copy_share(engine)
        head = (card, tokenizer_file, {**trainer, "step": step}) if self._ranks.is_first else None
        if self._ranks.rank < self._num_writers:
            self._task = _Task(lambda: self._write(share, head))
        self._waited = time.perf_counter() - begin

    def advance(self) -> None:
        """Move to the save's next part, after waiting for the current one on all ranks.

        Raises:
            RuntimeError: this rank's files were not written within ten minutes.
        """
        begin = time.perf_counter()
        entries, error = self._join()
        parts: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(parts, (entries, error))
        failed = next((f"rank {rank}: {error}" for rank, (_, error) in enumerate(parts) if error is not None), None)
        self._waited += time.perf_counter() - begin
        if failed is not None:
            self._give_up(failed)
        elif self._phase == "write":
            self._phase = "publish"
            if self._ranks.is_first:
                manifest = {name: entry for part, _ in parts for name, entry in part.items()}
                self._task = _Task(lambda: self._publish(manifest))
        else:
            self._phase = None
            logger.info("saved %s; training waited %.2f s for it", self._name(), self._waited)

    def finish(self) -> None:
        """Wait until no save is in progress; :attr:`failure` says how it went."""
        while self.busy:
            self.advance()

    def mark_best(self, metric: str, value: float) -> None:
        """Mark the newest save, which must be complete, as the best so far; it is kept until another one is marked.

        A full disk is logged and does not end the run.
        """
        if self.busy or self.failure is not None:
            raise ValueError("the newest save is not complete")
        if self._ranks.is_first:
            try:
                write_json(self.folder / BEST, {"checkpoint": self._name(), "metric": metric, "value": value})
                self._prune()  # the best before this one may be old
            except OSError as error:
                logger.error("%s is not marked as the best: %s", self._name(), error)

    def last_good(self) -> str:
        """The newest complete checkpoint, as text."""
        folders = complete_folders(self.folder)
        return str(folders[-1]) if folders else "none yet"

    def close(self) -> None:
        """Wait for this rank's thread, so that an exiting process does not cut off its writes."""
        if self._task is not None:
            self._task.wait(_WAIT_S)

    def _name(self) -> str:
        return f"step-{self.step:08d}"

    def _partial(self) -> Path:
        return self.folder / f".{self._name()}.partial"

    def _remove_partial(self, step: str) -> None:
        for leftover in self.folder.glob(f".step-{step}.partial"):
            remove_folder(leftover)

    def _join(self) -> tuple[_Entries, str | None]:
        task, self._task = self._task, None
        if task is None:
            return {}, None
        if not task.wait(_WAIT_S):
            raise RuntimeError(
                f"rank {self._ranks.rank}: the files of {self.folder / self._name()} are not written after {_WAIT_S} s;"
                f" does its disk respond?"
            )
        return task.entries, task.error

    def _give_up(self, failure: str) -> None:
        self.failure, self._phase = failure, None
        if self._ranks.is_first:
            logger.error("checkpoint %s was not saved: %s; the older ones are untouched", self._name(), failure)
            self._remove_partial(f"{self.step:08d}")
        dist.barrier()  # no rank may write into that folder again before it is gone

    def _copy_share(self, engine: Engine) -> dict[str, dict[str, Tensor]]:
        """Iterate over the full state and copy what this rank writes: {file prefix: {name: tensor}}.

        The memory for the copies (12 bytes per parameter over all writers, 16 with a moving average) is reused for
        every save: it is pinned on GPU machines, and fresh pages cost more than the copy.
        """
        owner = _owners(engine, self._num_writers)
        share: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in {_place(*key)[0]: None for key in owner}}
        on_gpu = engine.device.type == "cuda"
        for kind, name, tensor in engine.state(owner):
            if owner[kind, name] != self._ranks.rank:
                continue
            copy = self._copies.get((kind, name))
            if copy is None:
                copy = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=on_gpu)
                self._copies[kind, name] = copy
            copy.copy_(tensor, non_blocking=True)
            prefix, key = _place(kind, name)
            share[prefix][key] = copy
        if on_gpu:
            torch.cuda.synchronize(engine.device)
        return share

    def _write(
        self, share: dict[str, dict[str, Tensor]], head: tuple[ModelCard, Path, dict[str, Any]] | None
    ) -> _Entries:
        folder = self._partial()
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for prefix, tensors in share.items():
            path = folder / f"{prefix}.{self._ranks.rank:05d}-of-{self._num_writers:05d}.safetensors"
            write_tensors(path, tensors)
            paths.append(path)
        if head is not None:
            card, tokenizer_file, trainer = head
            shutil.copyfile(tokenizer_file, folder / TOKENIZER_FILE)
            fsync_file(folder / TOKENIZER_FILE)
            write_card(folder, card)
            write_json(folder / TRAINER, trainer)
            paths += [folder / TOKENIZER_FILE, folder / "model.json", folder / TRAINER]
        return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}

    def _publish(self, manifest: _Entries) -> _Entries:
        partial, final = self._partial(), self.folder / self._name()
        write_json(partial / MANIFEST, manifest)
        fsync_folder(partial)
        remove_folder(final)
        partial.rename(final)
        fsync_folder(self.folder)
        with atomic_path(self.folder / LATEST) as path:
            path.write_text(final.name + "\n", encoding="utf-8")
        self._prune()
        return {}

    def _prune(self) -> None:
        """Remove all checkpoints except the newest ones and the best."""
        best = self._best()
        for old in complete_folders(self.folder)[: -self._keep]:
            if old.name != best:
                # Under a name that the next start removes: a half-removed folder would otherwise stay forever.
                remove_folder(old.rename(self.folder / f".{old.name}.partial"))

    def _best(self) -> str | None:
        if not (self.folder / BEST).is_file():
            return None
        try:
            return read_best(self.folder / BEST)[0]
        except UserError as error:
            logger.warning("%s", error)
            return None


class _Task:
    """One part of a save in a thread: its manifest entries, or why it failed."""

    def __init__(self, work: Callable[[], _Entries]) -> None:
        self.entries: _Entries = {}
        self.error: str | None = None
        # A daemon, so that the process can exit even if the disk no longer responds.
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], _Entries]) -> None:
        try:
            self.entries = work()
        except Exception as failure:  # whatever it is, all ranks must know
            self.error = (str(failure) or repr(failure)).splitlines()[0]

    def runs(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Whether it ends within ``seconds``."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


def _place(kind: str, name: str) -> tuple[str, str]:
    """The prefix of the files that a state tensor goes into, and its name there."""
    if kind == "weight":
        return "model", name
    return (AVERAGE, name) if kind == EMA else ("optimizer", f"{name}.{kind}")


def _owners(engine: Engine, num_writers: int) -> dict[tuple[str, str], int]:
    """Which writer gets which tensor: largest first, each to the writer with the smallest load so far."""
    load = [0] * num_writers
    owners = {}
    entries = [(engine.state_shape(name).numel(), kind, name) for kind, name in engine.state_names()]
    for numel, kind, name in sorted(entries, reverse=True):
        writer = min(range(num_writers), key=lambda w: load[w])
        owners[kind, name] = writer
        load[writer] += numel
    return owners
