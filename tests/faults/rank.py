"""``mc2 train`` that fails on request and keeps a diary of its samples; run by ``matrix.py`` and the soak test.

    python -m tests.faults.rank JOB.json            one job, ranks in fresh processes, as a user starts it
    python -m tests.faults.rank --fork JOB.json     ranks forked from this process, which has imported everything

A job has ``folder`` (diary, log, marks of faults that have struck), ``config``, ``overrides``, ``processes``,
``restarts``, ``timeout``, ``step_seconds`` (minimum time of a step), ``stop_after`` (a step after which all ranks save
and exit, or null) and ``faults``. Each fault ``{at, step, rank, do}`` strikes once, when that rank reaches that moment
(:data:`MOMENTS`) of that step. ``do`` is a list of

- signals: ``KILL`` to the rank itself, ``launcher:TERM`` to the process that started it, ``worker:STOP`` to its first
  data worker;
- damage to files (:data:`FILES`), such as ``cut:SHARD``;
- ``poison``, which sets a weight to NaN on that rank, or ``poison scale``, which does so to ``logit_scale``'s gradient.
"""

import json
import os
import signal
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

import mc2_hpc.cli
from mc2_hpc.data.loader import TrainLoader
from mc2_hpc.data.packing import write_shard
from mc2_hpc.training import evaluating, launch, saving, trainer
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.save_policy import Agreed
from tests.faults.tiny_run import NUM_NEW, draw_pairs

Job = dict[str, Any]

MOMENTS: dict[str, tuple[Any, str]] = {
    "start-up": (trainer, "newest_checkpoint"),
    "forward": (Engine, "features"),
    "mid-step": (Engine, "step"),  # gradients are ready, nothing is updated yet
    "evaluation": (evaluating, "run_suite"),
    "copy": (saving, "_owners"),
    "writing": (saving, "write_tensors"),
    "before rename": (saving, "fsync_folder"),
    "before latest": (saving, "atomic_path"),  # the folder has its name, `latest` still names the previous one
}
"""The function called at each moment of a step or of the save after it."""


def run_rank(job: Job) -> int:
    """Train as this process's rank in ``job``."""
    rank, trained, saved = int(os.environ["RANK"]), 0, 0
    loader: TrainLoader | None = None
    attempt = f"{os.getppid()}-{os.environ['MASTER_PORT']}"
    diary = open(Path(job["folder"]) / f"{attempt}-{rank}.jsonl", "a", encoding="utf-8", buffering=1)

    def note(run: trainer.Trainer, batch: Any) -> None:
        nonlocal trained, loader
        trained, loader = run.progress.step, run.loader
        line = {"step": trained, "world": run.ranks.world_size, "time": time.time(), "keys": batch.keys}
        diary.write(json.dumps(line) + "\n")
        time.sleep(job["step_seconds"])

    def note_save(*_: Any, step: int, **__: Any) -> None:
        nonlocal saved
        saved = step

    def checkpoint(run: trainer.Trainer, pending: Any, votes: Agreed) -> None:
        plain_checkpoint(run, pending, replace(votes, stop=votes.stop or pending.step == job["stop_after"]))

    def strike(at: str, owner: Any) -> None:
        for number, fault in enumerate(job["faults"]):
            step = {"evaluation": trained, "forward": trained + 1, "mid-step": trained + 1}.get(at, saved)
            if (fault["at"], fault["rank"]) == (at, rank) and (at == "start-up" or fault["step"] == step):
                if _first_time(Path(job["folder"]) / f"fault{number}"):
                    for deed in fault["do"]:
                        _do(deed, owner, loader)

    plain_checkpoint, trainer.Trainer._checkpoint = trainer.Trainer._checkpoint, checkpoint
    _before(trainer.Trainer, "_count", note)
    _before(saving.CheckpointWriter, "begin", note_save)
    for at, (owner, name) in MOMENTS.items():
        _before(owner, name, lambda first, *_, at=at, **__: strike(at, first))
    options = ["--timeout", str(job["timeout"])]
    return mc2_hpc.cli.main(["train", *options, job["config"], *job["overrides"]])


def _before(owner: Any, name: str, hook: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        hook(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, both)


def _first_time(mark: Path) -> bool:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _do(deed: str, owner: Any, loader: TrainLoader | None) -> None:
    """``owner``: the first argument of the moment's function."""
    whom, _, what = deed.rpartition(":")
    if deed == "poison":
        with torch.no_grad():
            next(owner._engine.module.parameters()).fill_(torch.nan)
    elif deed == "poison scale":
        owner.logit_scale.grad.fill_(torch.nan)
    elif whom in FILES:
        FILES[whom](Path(what))
    else:
        number = signal.Signals[f"SIG{what}"]
        if whom == "worker":
            threading.Thread(target=_signal_reading_worker, args=(loader, number), daemon=True).start()
        else:
            os.kill(os.getppid() if whom == "launcher" else os.getpid(), number)


def _signal_reading_worker(loader: TrainLoader, number: int) -> None:
    """Signal the first data worker while it is reading a shard, which takes a few milliseconds of a step."""
    pid, board = loader._shares.processes[0].pid, loader._shares.board
    while True:
        while board.reading(0) is None:
            time.sleep(1e-4)
        os.kill(pid, number)
        if number != signal.SIGSTOP:
            return
        time.sleep(0.05)  # until it has certainly stopped
        if board.reading(0) is not None:
            return
        os.kill(pid, signal.SIGCONT)


def _fill(folder: Path) -> None:
    """Leave no room on the disk of ``folder``."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def _free(folder: Path) -> None:
    (folder / "ballast").unlink()


def _cut(shard: Path) -> None:
    """Truncate it to half while it may be open."""
    os.truncate(shard, shard.stat().st_size // 2)


def _append(shard: Path) -> None:
    """Append new samples while it may be open."""
    with tarfile.open(shard, "a") as tar:
        for pair in draw_pairs(NUM_NEW, prefix="new"):
            for extension, payload in (("jpg", pair.image), ("txt", pair.text.encode())):
                member = tarfile.TarInfo(f"{pair.key}.{extension}")
                member.size = len(payload)
                tar.addfile(member, BytesIO(payload))


def _replace(shard: Path) -> None:
    """Replace it with another shard of the same name."""
    pairs = draw_pairs(NUM_NEW, prefix="new")
    write_shard(shard, [(pair.key, {"jpg": pair.image, "txt": pair.text.encode()}) for pair in pairs])


def _grow(path: Path) -> None:
    """Append what ``<path>.more`` has."""
    with open(path, "ab") as file:
        file.write(Path(f"{path}.more").read_bytes())


FILES: dict[str, Callable[[Path], None]] = {
    "fill": _fill,
    "free": _free,
    "cut": _cut,
    "remove": Path.unlink,
    "append": _append,
    "replace": _replace,
    "grow": _grow,
}


class _Forked:
    """A rank forked from this process, with the parts of ``subprocess.Popen`` that the launcher needs."""

    def __init__(self, environment: dict[str, str], job: Job) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                    signal.signal(number, signal.SIG_DFL)
                os.setsid()
                launch.end_with_parent()
                os.environ.update(environment)
                code = run_rank(job)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_job(job: Job, *, fork: bool) -> int:
    """Run a job as ``mc2 train --processes N --restarts K`` does; returns its exit code."""
    log = os.open(Path(job["folder"]) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    command = [sys.executable, "-m", "tests.faults.rank", "--rank", json.dumps(job)]
    if fork:
        launch.start_rank = lambda command, environment: _Forked(environment, job)
    return launch.launch(command, processes=job["processes"], restarts=job["restarts"], stop_s=60)


if __name__ == "__main__":
    *how, what = sys.argv[1:]
    if how == ["--rank"]:
        sys.exit(run_rank(json.loads(what)))
    sys.exit(run_job(json.loads(Path(what).read_text(encoding="utf-8")), fork=how == ["--fork"]))
