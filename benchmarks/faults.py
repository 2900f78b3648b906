"""The fault matrix: what is broken when, and how the run that went through it compares with an undisturbed one.

Each row of :data:`ROWS` is a story of one or more starts of ``mc2 train``. ``tests/training/test_faults.py`` runs them
with ranks forked from one process; ``bench_faults.py`` in fresh processes, as a user would, and keeps the times.
"""

import io
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.data.shards import Pair
from mc2_hpc.data.tokenizer import train_tokenizer
from mc2_hpc.training.stop import LOST_RANK, SAVED

DOCS = Path(__file__).parents[1] / "docs" / "faults.md"
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"
SCRIPT = Path(__file__).with_name("fault_rank.py")
SAMPLES, BATCH, STEPS, EVERY = 512, 32, 48, 8
EPOCH = SAMPLES // BATCH
"""Steps of an epoch: every sample is good, so each comes once in it."""
WAIT_S = 8
"""How long ranks wait for one another in the rows about ranks that hang."""


def prepare(folder: Path) -> Path:
    """Pictures, captions, a tokenizer and the config of a small fp32 run; returns the config's path."""
    names = ["red", "lime", "blue", "yellow", "cyan", "magenta", "white", "black"]
    pairs = []
    for number in range(SAMPLES):
        inside, outside = names[number % 8], names[number // 8 % 8]
        picture = Image.new("RGB", (40, 40), outside)
        picture.paste(inside, (8 + number % 5, 8 + number % 7, 32, 32))
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=90)
        text = f"a {inside} square on {outside} ground, number {number % 3}"
        pairs.append(Pair(key=f"{number:06d}", image=data.getvalue(), text=text, lang="en"))
    pack_pairs(pairs, folder / "shards", pairs_per_shard=64)
    tokenizer = train_tokenizer((p.text for p in pairs), folder / "sp.model", vocab_size=64, style="xlmv")
    config = folder / "run.yaml"
    config.write_text(
        f"""\
steps: {STEPS}
global_batch: {BATCH}
precision: fp32
log_every: 1
model:
  preset: ViT-S-16-worldwide
  embed_dim: 32
  vision: {{image_size: 32, width: 64, layers: 2, head_width: 32}}
  text: {{vocab_size: {tokenizer.vocab_size}, context_length: 24, width: 48, heads: 3, layers: 2}}
data: {{train: {folder / "shards"}, tokenizer: {folder / "sp.model"}, lanes: 8, workers: 0}}
optim: {{lr: 1.0e-3, warmup: 4}}
zero: {{stage: 1}}
checkpoint: {{every: {EVERY}, keep: 3}}
""",
        encoding="utf-8",
    )
    return config


def job(config: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """A job for ``fault_rank.py`` that trains into ``folder / "run"``."""
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"output={folder / 'run'}", *changes.pop("overrides", ())]
    plain = {"processes": 2, "restarts": 0, "timeout": 120, "step_seconds": 0, "stop_after": None, "faults": []}
    return {"folder": str(folder), "config": str(config), "overrides": overrides, **plain, **changes}


class Starter:
    """Runs jobs: in fresh processes, or forked from a server that has imported everything (``fork=True``)."""

    def __init__(self, *, fork: bool) -> None:
        self._server: subprocess.Popen[str] | None = None
        if fork:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._server = subprocess.Popen([sys.executable, str(SCRIPT)], **pipes)

    def run(self, task: Mapping[str, Any]) -> int:
        """Run a job to its end; returns its exit code."""
        if self._server is None:
            path = Path(task["folder"]) / "job.json"
            path.write_text(json.dumps(task), encoding="utf-8")
            return subprocess.run([sys.executable, str(SCRIPT), str(path)]).returncode
        assert self._server.stdin and self._server.stdout
        print(json.dumps(task), file=self._server.stdin, flush=True)
        self._server.stdout.readline()
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            assert self._server.stdin
            self._server.stdin.close()
            self._server.wait()


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks, as its diary tells."""

    world: int
    keys: dict[int, list[str]]
    """Of every step that all ranks completed, in lane order."""
    times: dict[int, float]
    """When the last rank completed it."""


def read_diary(folder: Path) -> list[Attempt]:
    """The attempts of a job's folder, in order."""
    ranks: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for path in folder.glob("*-*-*.jsonl"):
        attempt, _, rank = path.stem.rpartition("-")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        if lines:
            ranks.setdefault(attempt, {})[int(rank)] = lines
    attempts = []
    for diaries in ranks.values():
        world = diaries[min(diaries)][0]["world"]
        steps = [{line["step"]: line for line in diaries.get(rank, [])} for rank in range(world)]
        done = sorted(set.intersection(*map(set, steps)))
        keys = {step: [key for rank in steps for key in rank[step]["keys"]] for step in done}
        attempts.append(Attempt(world, keys, {step: max(rank[step]["time"] for rank in steps) for step in done}))
    return sorted((a for a in attempts if a.keys), key=lambda a: min(a.times.values()))


def history(attempts: list[Attempt]) -> dict[int, Attempt]:
    """Step to the attempt whose result the run kept: the last that did it."""
    return {step: attempt for attempt in attempts for step in attempt.keys}


def account(folder: Path) -> dict[str, Any]:
    """Steps done more than once, samples lost and repeated within epochs, and seconds from the first fault to the
    first step that a later start went beyond the one it hit (``None``: it went on by itself)."""
    attempts = read_diary(folder)
    kept = history(attempts)
    epochs: dict[int, Counter[str]] = {}
    for step, attempt in kept.items():
        epochs.setdefault((step - 1) // EPOCH, Counter()).update(attempt.keys[step])
    marks = [mark.stat().st_mtime for mark in folder.glob("fault*")]
    recovery = None
    if marks:
        struck = min(marks)
        before = [attempt for attempt in attempts if min(attempt.times.values()) < struck]
        beyond = 1 + max((step for attempt in before for step in attempt.keys), default=0)
        after = [attempt.times[beyond] for attempt in attempts if attempt not in before and beyond in attempt.times]
        recovery = min(after) - struck if after else None
    whole = {f"{number:06d}" for number in range(SAMPLES)}
    return {
        "steps_lost": sum(len(attempt.keys) for attempt in attempts) - len(kept),
        "samples_lost": sum(len(whole - set(seen)) for seen in epochs.values()),
        "samples_repeated": sum(count - 1 for seen in epochs.values() for count in seen.values()),
        "recovery_seconds": recovery,
    }


def losses(folder: Path) -> dict[int, float]:
    """Loss of every step in a job's ``metrics.jsonl``."""
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def state_hashes(folder: Path, step: int = STEPS) -> dict[str, str]:
    """SHA-256 of the weight and moment files of a job's checkpoint."""
    manifest = json.loads((folder / "run" / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".safetensors")}


def largest_difference(found: dict[int, float], expected: dict[int, float]) -> float:
    """Largest relative difference of two loss curves over the same steps."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    return max(abs(found[step] - expected[step]) / expected[step] for step in expected)


def newest(folder: Path) -> Path:
    """A job's newest checkpoint."""
    return max((folder / "run" / "checkpoints").glob("step-*"))


def flip_byte(folder: Path) -> None:
    """Damage a job's newest checkpoint."""
    path = max(newest(folder).glob("model.*"))
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


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A disk of its own under ``folder``; raises ``OSError`` where this user may not mount one."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        raise OSError(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the matrix."""

    fault: str
    moment: str
    outcome: str
    starts: tuple[tuple[int, int], ...]
    """(ranks, exit code) of each start of the command."""
    faults: tuple[dict[str, Any], ...] = ()
    restarts: int = 0
    timeout: float = 120
    at_most: int = 2 * EVERY
    """Steps that may have to be done again: since the last save, or where that was not finished, the one before."""
    damage: Callable[[Path], None] | None = None
    """What happens to the files between the first start and the second."""
    disk: int = 0
    """Megabytes of the disk the run has to itself; 0: the machine's."""
    says: str = ""
    """Words that the log must have."""
    slow: bool = False
    """Left to ``make test-slow``: a moment or rank more of a row that is tested."""

    @property
    def same_ranks(self) -> bool:
        """Whether the run can be compared bit by bit with the undisturbed one on 2 ranks."""
        return all(ranks == 2 for ranks, _ in self.starts)


def _kill(at: str, rank: int, step: int = 20, **rest: Any) -> Row:
    moment = {"start-up": "start-up", "mid-step": f"in step {step}"}.get(at, f"save of step {step}: {at}")
    fault = {"at": at, "rank": rank, "step": step, "do": ["KILL"]}
    which = "rank 0" if rank == 0 else "last rank"
    rest = {"fault": f"kill -9 of {which}", "outcome": "restarted by --restarts", **rest}
    return Row(moment=moment, starts=((2, 0),), faults=(fault,), restarts=1, says="killed by SIGKILL", **rest)


def _signal(fault: str, at: str, do: list[str], *, rank: int = 1, step: int = 20, **rest: Any) -> Row:
    moment = {"start-up": "start-up", "mid-step": f"in step {step}"}.get(at, f"save of step {step}: {at}")
    rest = {"outcome": "saved, exit 75; the next start goes on", "at_most": 0, **rest}
    faults = ({"at": at, "rank": rank, "step": step, "do": do},)
    return Row(fault=fault, moment=moment, starts=((2, SAVED), (2, 0)), faults=faults, **rest)


def _damage(fault: str, damage: Callable[[Path], None], outcome: str, **rest: Any) -> Row:
    faults = ({"at": "mid-step", "rank": 0, "step": 20, "do": ["TERM"]},)
    starts = ((2, SAVED), (2, 0))
    return Row(
        fault=fault, moment="between two starts", starts=starts, outcome=outcome, faults=faults, damage=damage, **rest
    )


_BACK = "the one before is taken, loudly"
_DISK = "{disk}"

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
    _signal("SIGTERM to one rank", "mid-step", ["TERM"], says="saved after step"),
    _signal("SIGUSR1 to the launcher", "mid-step", ["launcher:USR1"], says="SIGUSR1: saved after step"),
    _signal("SIGTERM and SIGUSR1, twice each", "mid-step", ["TERM", "USR1", "TERM", "launcher:USR1"], slow=True),
    _signal(
        "SIGTERM to the launcher", "start-up", ["launcher:TERM"], outcome="exit 75 at once; the next start goes on"
    ),
    _signal("SIGTERM to one rank", "writing", ["TERM"], step=16, slow=True),
    Row(
        fault="kill -9 of the launcher",
        moment="in step 20",
        outcome="the ranks save and leave; the next start waits for them",
        starts=((2, -9), (2, 0)),
        faults=({"at": "mid-step", "rank": 0, "step": 20, "do": ["launcher:KILL"]},),
        at_most=0,
        says="SIGTERM: saved after step",
    ),
    Row(
        fault=f"a rank hangs (SIGSTOP), --timeout {WAIT_S}",
        moment="in step 20",
        outcome="the others say what they waited for; restarted",
        starts=((2, 0),),
        faults=({"at": "mid-step", "rank": 1, "step": 20, "do": ["STOP"]},),
        restarts=1,
        timeout=WAIT_S,
        says="rank 0 lost another rank in step 2",
    ),
    Row(
        fault="kill -9 of a rank, no --restarts",
        moment="in step 20",
        outcome=f"exit {LOST_RANK}; the next start goes on",
        starts=((2, LOST_RANK), (2, 0)),
        faults=({"at": "mid-step", "rank": 1, "step": 20, "do": ["KILL"]},),
        says="rank 0 lost another rank in step",
        slow=True,
    ),
    Row(
        fault="full disk",
        moment="save of step 16: writing",
        outcome="said, trained on; the save of step 24 has room again",
        starts=((2, 0),),
        faults=(
            {"at": "copy", "rank": 0, "step": 16, "do": [f"fill:{_DISK}"]},
            {"at": "copy", "rank": 0, "step": 24, "do": [f"free:{_DISK}"]},
        ),
        disk=48,
        at_most=0,
        says="checkpoint step-00000016 was not saved",
    ),
    Row(
        fault="full disk, then kill -9",
        moment="saves of steps 16 to 40, in step 42",
        outcome="goes on from step 8 once there is room",
        starts=((2, LOST_RANK), (2, 0)),
        faults=(
            {"at": "copy", "rank": 0, "step": 16, "do": [f"fill:{_DISK}"]},
            {"at": "mid-step", "rank": 0, "step": 42, "do": [f"free:{_DISK}", "KILL"]},
        ),
        disk=48,
        at_most=40,
        says="checkpoint step-00000032 was not saved",
        slow=True,
    ),
    _damage("flipped byte in the newest checkpoint", flip_byte, _BACK, says="does not match its SHA-256"),
    _damage("truncated file in it", _truncate, _BACK, says="has 1000 bytes instead of", slow=True),
    _damage("missing file in it", _remove_file, _BACK, says="is missing", slow=True),
    _damage("broken manifest in it", _break_manifest, _BACK, says="manifest.json cannot be read", slow=True),
    _damage("empty `latest`", _empty_latest, "not needed to go on", at_most=0, slow=True),
    _damage("`latest` names nothing", _dangling_latest, "not needed to go on", at_most=0, slow=True),
    Row(
        fault="allocation 1, 2, 3, 1 ranks, each killed with -9",
        moment="in steps 11, 22, 37",
        outcome="goes on with the ranks there are",
        starts=((1, LOST_RANK), (2, LOST_RANK), (3, LOST_RANK), (1, 0)),
        faults=(
            {"at": "mid-step", "rank": 0, "step": 11, "do": ["KILL"]},
            {"at": "mid-step", "rank": 1, "step": 22, "do": ["KILL"]},
            {"at": "mid-step", "rank": 2, "step": 37, "do": ["KILL"]},
        ),
        at_most=3 * 2 * EVERY,
    ),
]


def run_row(row: Row, config: Path, folder: Path, starter: Starter, undisturbed: Path) -> dict[str, Any]:
    """Run a row in ``folder``; returns its figures.

    Raises:
        AssertionError: it did not go as the row says, or the run differs from the undisturbed one.
        OSError: it needs a small disk, and this user may not mount one.
    """
    if row.disk:
        with small_disk(folder / "run", row.disk):
            return _run_row(row, config, folder, starter, undisturbed)
    return _run_row(row, config, folder, starter, undisturbed)


def _run_row(row: Row, config: Path, folder: Path, starter: Starter, undisturbed: Path) -> dict[str, Any]:
    faults = json.loads(json.dumps(row.faults).replace(_DISK, str(folder / "run")))
    for number, (ranks, expected) in enumerate(row.starts):
        if number == 1 and row.damage is not None:
            row.damage(folder)
        task = job(config, folder, processes=ranks, restarts=row.restarts, timeout=row.timeout, faults=faults)
        code = starter.run(task)
        assert code == expected, f"start {number} ended with exit code {code}, not {expected}\n{_log(folder)}"
    log = _log(folder)
    assert row.says in log, f"{row.says!r} is not in the log\n{log}"
    assert len(list(folder.glob("fault*"))) == len(faults), "a fault did not strike"
    figures = account(folder)
    assert figures["steps_lost"] <= row.at_most, figures
    assert figures["samples_lost"] == figures["samples_repeated"] == 0, figures
    kept, expected_keys = history(read_diary(folder)), history(read_diary(undisturbed))
    assert sorted(kept) == list(range(1, STEPS + 1))
    assert all(kept[step].keys[step] == expected_keys[step].keys[step] for step in kept), "other samples"
    difference = largest_difference(losses(folder), losses(undisturbed))
    if row.same_ranks:
        assert difference == 0 and state_hashes(folder) == state_hashes(undisturbed), difference
    assert difference <= 1e-5, difference
    leftovers = [path.name for path in (folder / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not leftovers, leftovers
    return {
        "fault": row.fault,
        "moment": row.moment,
        "outcome": row.outcome,
        **figures,
        "loss_difference": difference,
        "bitwise": row.same_ranks,
    }


def _log(folder: Path) -> str:
    return (folder / "log").read_text(encoding="utf-8")


def run_undisturbed(config: Path, folder: Path, starter: Starter) -> Path:
    """The run on 2 ranks that nothing happens to."""
    began = time.monotonic()
    code = starter.run(job(config, folder))
    assert code == 0, f"exit code {code} after {time.monotonic() - began:.0f} s\n{_log(folder)}"
    return folder


def table(rows: list[dict[str, Any]] | None) -> str:
    """The matrix in Markdown: of measured rows, or without figures."""
    if rows is None:
        lines = ["| Fault | Moment | Outcome |", "|---|---|---|"]
        return "\n".join(lines + [f"| {row.fault} | {row.moment} | {row.outcome} |" for row in ROWS])
    lines = ["| Fault | Moment | Outcome | Steps lost | Samples lost | Back after |", "|---|---|---|---|---|---|"]
    for row in rows:
        seconds = row["recovery_seconds"]
        back = "–" if seconds is None else f"{seconds:.1f} s"
        figures = f"{row['steps_lost']} | {row['samples_lost']} | {back}"
        lines.append(f"| {row['fault']} | {row['moment']} | {row['outcome']} | {figures} |")
    return "\n".join(lines)


def write_table(result: Path | None) -> None:
    """Put the matrix into ``docs/faults.md``, with the figures of a result of ``bench_faults.py``."""
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"] if result else None
    head, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":  # python benchmarks/faults.py [RESULT.json]
    write_table(Path(sys.argv[1]) if sys.argv[1:] else None)
