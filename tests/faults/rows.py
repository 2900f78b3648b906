"""The rows of the fault matrix: what breaks and when, the outcome, and the evidence for it."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc2_hpc.training.stop import LOST_RANK, SAVED
from tests.faults.tiny_run import NUM_NEW, PER_SHARD

STEPS, EVERY = 48, 8
"""Steps in the run, and between its saves."""
WAIT_S = 8
"""How long ranks wait for one another in the rows about ranks that hang."""
STALL_S = 20
"""``data.stall_seconds`` in the rows about data workers; the workers must have started by then."""
VICTIM = 3
"""Number of the shard that is damaged in the rows about shards."""
DISK, SHARD, SHARDS, KEYS = "{disk}", "{shard}", "{shards}", "{keys}"
"""Placeholders for the run's folder, the victim, the folder of shards, and rank 1's samples in step 20."""


def newest(folder: Path) -> Path:
    """A job's newest checkpoint."""
    return max((folder / "run" / "checkpoints").glob("step-*"))


def flip_byte(checkpoint: Path) -> None:
    """Damage a checkpoint."""
    path = max(checkpoint.glob("model.*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(folder: Path) -> None:
    path = min(newest(folder).glob("optimizer.*"))
    path.write_bytes(path.read_bytes()[:1000])


def _remove_file(folder: Path) -> None:
    min(newest(folder).glob("optimizer.*")).unlink()


def _break_manifest(folder: Path) -> None:
    (newest(folder) / "manifest.json").write_text("{", encoding="utf-8")


def _empty_latest(folder: Path) -> None:
    (folder / "run" / "checkpoints" / "latest").write_text("", encoding="utf-8")


def _dangling_latest(folder: Path) -> None:
    (folder / "run" / "checkpoints" / "latest").write_text("step-99999999\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the matrix."""

    fault: str
    moment: str
    outcome: str
    starts: tuple[tuple[int, int], ...]
    """(ranks, exit code) of each start of the command."""
    faults: tuple[dict[str, Any], ...] = ()
    restarts: int = 0
    timeout: float = 120
    at_most: int = 2 * EVERY
    """The most steps to repeat: since the last save or, if that was not finished, since the previous one."""
    damage: Callable[[Path], None] | None = None
    """What happens to the files between the first start and the second."""
    disk: int = 0
    """Size in megabytes of the run's own disk; 0: it uses the machine's."""
    overrides: tuple[str, ...] = ()
    """Of the run's config."""
    explains: Callable[[int, Counter[str], Mapping[str, int]], bool] | None = None
    """For rows that damage a shard: whether the number of its samples that were left out, the new samples found there
    and the run's own skip counts agree. Such a run is not compared with the undisturbed one beyond that step."""
    says: tuple[str, ...] = ()
    """Words that the log must contain."""
    slow: bool = False
    """Left to ``make test-slow``: another moment or rank of a row that is already tested."""

    @property
    def same_ranks(self) -> bool:
        """Whether the run can be compared bit by bit with the undisturbed one on 2 ranks."""
        return all(ranks == 2 for ranks, _ in self.starts)


def _kill(at: str, rank: int, step: int = 20, **rest: Any) -> Row:
    moment = {"start-up": "start-up", "mid-step": f"in step {step}"}.get(at, f"save of step {step}: {at}")
    fault = {"at": at, "rank": rank, "step": step, "do": ["KILL"]}
    which = "rank 0" if rank == 0 else "the last rank"
    rest = {"fault": f"kill -9 of {which}", "outcome": "restarted by --restarts", **rest}
    return Row(moment=moment, starts=((2, 0),), faults=(fault,), restarts=1, says=("killed by SIGKILL",), **rest)


def _signal(fault: str, at: str, do: list[str], *, rank: int = 1, step: int = 20, **rest: Any) -> Row:
    moment = {"start-up": "start-up", "mid-step": f"in step {step}"}.get(at, f"save of step {step}: {at}")
    rest = {"outcome": "saved, exit 75; the next start resumes", "at_most": 0, **rest}
    faults = ({"at": at, "rank": rank, "step": step, "do": do},)
    return Row(fault=fault, moment=moment, starts=((2, SAVED), (2, 0)), faults=faults, **rest)


def _damage(fault: str, damage: Callable[[Path], None], outcome: str, **rest: Any) -> Row:
    faults = ({"at": "mid-step", "rank": 0, "step": 20, "do": ["TERM"]},)
    starts = ((2, SAVED), (2, 0))
    return Row(
        fault=fault, moment="between two starts", starts=starts, outcome=outcome, faults=faults, damage=damage, **rest
    )


def _shard(fault: str, deed: str, outcome: str, *, step: int = 20, **rest: Any) -> Row:
    faults = ({"at": "mid-step", "rank": 0, "step": step, "do": [f"{deed}:{SHARD}"]}, *rest.pop("more", ()))
    rest = {"moment": f"in step {step}", "starts": ((2, 0),), "at_most": 0, "slow": True, **rest}
    return Row(fault=fault, outcome=outcome, faults=faults, **rest)


def _worker(fault: str, do: str, outcome: str, **rest: Any) -> Row:
    faults = ({"at": "mid-step", "rank": 1, "step": 20, "do": [f"worker:{do}"]},)
    overrides = ("data.workers=1", f"data.stall_seconds={STALL_S}")
    rest = {"moment": "in step 20", "slow": True, **rest}
    return Row(fault=fault, outcome=outcome, faults=faults, overrides=overrides, **rest)


def _of_whole_epochs(left_out: int) -> bool:
    return left_out > 0 and left_out % PER_SHARD == 0


_BACK = "the previous checkpoint is used, and the log says so"

ROWS = [
    _kill("start-up", 0, at_most=0),
    _kill("start-up", 1, at_most=0, slow=True),
    _kill("mid-step", 0, slow=True),
    _kill("mid-step", 1),
    _kill("copy", 1, step=16, slow=True),
    _kill("writing", 0, step=16),
    _kill("writing", 1, step=16, slow=True),
    _kill("before rename", 0, step=16),
    _kill("before latest", 0, step=16, slow=True),
    _signal("SIGTERM to one rank", "mid-step", ["TERM"], says=("saved after step",)),
    _signal("SIGUSR1 to the launcher", "mid-step", ["launcher:USR1"], says=("SIGUSR1: saved after step",)),
    _signal("SIGTERM and SIGUSR1, twice each", "mid-step", ["TERM", "USR1", "TERM", "launcher:USR1"], slow=True),
    _signal(
        "SIGTERM to the launcher",
        "start-up",
        ["launcher:TERM"],
        outcome="exit 75 immediately; the next start continues",
    ),
    _signal("SIGTERM to one rank", "writing", ["TERM"], step=16, slow=True),
    Row(
        fault="kill -9 of the launcher",
        moment="in step 20",
        outcome="the ranks save and exit; the next start waits for them",
        starts=((2, -9), (2, 0)),
        faults=({"at": "mid-step", "rank": 0, "step": 20, "do": ["launcher:KILL"]},),
        at_most=0,
        says=("SIGTERM: saved after step",),
    ),
    Row(
        fault=f"a rank hangs (SIGSTOP), --timeout {WAIT_S}",
        moment="in step 20",
        outcome="the other ranks report what they waited for; restarted",
        starts=((2, 0),),
        faults=({"at": "mid-step", "rank": 1, "step": 20, "do": ["STOP"]},),
        restarts=1,
        timeout=WAIT_S,
        says=("rank 0 lost another rank in step 2",),
    ),
    Row(
        fault="kill -9 of a rank, no --restarts",
        moment="in step 20",
        outcome=f"exit {LOST_RANK}; the next start resumes",
        starts=((2, LOST_RANK), (2, 0)),
        faults=({"at": "mid-step", "rank": 1, "step": 20, "do": ["KILL"]},),
        says=("rank 0 lost another rank in step",),
        slow=True,
    ),
    Row(
        fault="full disk",
        moment="save of step 16: writing",
        outcome="logged, training continues; the save of step 24 has room again",
        starts=((2, 0),),
        faults=(
            {"at": "copy", "rank": 0, "step": 16, "do": [f"fill:{DISK}"]},
            {"at": "copy", "rank": 0, "step": 24, "do": [f"free:{DISK}"]},
        ),
        disk=48,
        at_most=0,
        says=("checkpoint step-00000016 was not saved",),
    ),
    Row(
        fault="full disk, then kill -9",
        moment="saves of steps 16 to 40, in step 42",
        outcome="resumes from step 8 once there is room",
        starts=((2, LOST_RANK), (2, 0)),
        faults=(
            {"at": "copy", "rank": 0, "step": 16, "do": [f"fill:{DISK}"]},
            {"at": "mid-step", "rank": 0, "step": 42, "do": [f"free:{DISK}", "KILL"]},
        ),
        disk=48,
        at_most=40,
        says=("checkpoint step-00000032 was not saved",),
        slow=True,
    ),
    _damage(
        "flipped byte in the newest checkpoint",
        lambda job: flip_byte(newest(job)),
        _BACK,
        says=("does not match its SHA-256",),
    ),
    _damage("truncated file in it", _truncate, _BACK, says=("has 1000 bytes instead of",), slow=True),
    _damage("missing file in it", _remove_file, _BACK, says=("is missing",), slow=True),
    _damage("broken manifest in it", _break_manifest, _BACK, says=("manifest.json cannot be read",), slow=True),
    _damage("empty `latest`", _empty_latest, "not needed to resume", at_most=0, slow=True),
    _damage("`latest` names a missing checkpoint", _dangling_latest, "not needed to resume", at_most=0, slow=True),
    _shard(
        "a shard is truncated to half; kill -9 of a rank",
        "cut",
        "missing samples are skipped and counted, ranks take equal steps; restarted",
        moment="in step 20; in step 36",
        more=({"at": "mid-step", "rank": 1, "step": 36, "do": ["KILL"]},),
        restarts=1,
        at_most=2 * EVERY,
        explains=lambda left_out, new, skipped: (
            left_out == PER_SHARD * skipped["shard_unreadable"] + skipped["read_error"]
            and skipped["shard_unreadable"] > 0
            and skipped["read_error"] > 0
        ),
        says=(f"skipped, shard_unreadable: {SHARD}: cut off", f"skipped, read_error: {SHARD}, row", "restart 1 of 1"),
        slow=False,
    ),
    _shard(
        "a shard is deleted",
        "remove",
        "read to its end while open, then skipped and counted; ranks take equal steps",
        explains=lambda left_out, new, skipped: left_out == PER_SHARD * skipped["shard_unreadable"] > 0,
        says=(f"skipped, shard_unreadable: {SHARD}: No such file",),
    ),
    _shard(
        f"a shard grows by {NUM_NEW} samples",
        "append",
        "they are used from the next epoch on, nothing is skipped; ranks take equal steps",
        step=4,  # so that the next epoch is over before the run is
        explains=lambda left_out, new, skipped: (
            left_out == 0 and len(new) == NUM_NEW and max(new.values()) <= 2 and skipped["shard_changed"] > 0
        ),
        says=(f"skipped, shard_changed: {SHARD}",),
    ),
    _shard(
        f"a shard is replaced by another with {NUM_NEW} samples",
        "replace",
        "read to its end while open, then the new one; ranks take equal steps",
        explains=lambda left_out, new, skipped: (
            _of_whole_epochs(left_out) and len(new) == NUM_NEW and skipped["shard_changed"] > 0
        ),
        says=(f"skipped, shard_changed: {SHARD}",),
    ),
    _worker(
        f"a data worker hangs (SIGSTOP), data.stall_seconds {STALL_S}",
        "STOP",
        f"exit {LOST_RANK}, rank, worker and shard named; the next start resumes",
        starts=((2, LOST_RANK), (2, 0)),
        says=(
            f"rank 1: no samples from data worker 0 (lanes 4-7), which has been reading {SHARDS}/",
            f"none for {STALL_S} s; fix it and restart the run",
            "rank 0 lost another rank in step 2",
        ),
    ),
    _worker(
        "kill -9 of a data worker",
        "KILL",
        "rank and worker named; restarted by --restarts",
        starts=((2, 0),),
        restarts=1,
        says=("rank 1: no samples from data worker 0 (lanes 4-7)", "died (killed by SIGKILL; out of memory?)"),
    ),
    Row(
        fault="a weight turns NaN on one rank",
        moment="in step 20",
        outcome="exit 1, step, keys and last good checkpoint named; the next start resumes from it",
        starts=((2, 1), (2, 0)),
        faults=({"at": "forward", "rank": 1, "step": 20, "do": ["poison"]},),
        restarts=1,
        says=("loss is nan at step 20; last good checkpoint: ", f"step-00000016; keys of rank 1's batch: {KEYS}"),
        slow=True,
    ),
    Row(
        fault="allocation 1, 2, 3, 1 ranks, each killed with -9",
        moment="in steps 11, 22, 37",
        outcome="resumes with the available ranks",
        starts=((1, LOST_RANK), (2, LOST_RANK), (3, LOST_RANK), (1, 0)),
        faults=(
            {"at": "mid-step", "rank": 0, "step": 11, "do": ["KILL"]},
            {"at": "mid-step", "rank": 1, "step": 22, "do": ["KILL"]},
            {"at": "mid-step", "rank": 2, "step": 37, "do": ["KILL"]},
        ),
        at_most=3 * 2 * EVERY,
    ),
]
