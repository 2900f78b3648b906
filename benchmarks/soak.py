"""Soak test: training with a random fault every minute, then a check that none of them changed the result.

    python -m benchmarks.soak --minutes 30

Ranks are killed, hung or asked to stop, the launcher is killed, the newest checkpoint is damaged, and the number of
ranks changes, in an order drawn from ``--seed``. When the time is up, the run is stopped and saved. It is then repeated
without faults, each step on the same number of ranks: samples, losses, weights and moments must be bitwise equal, and
each epoch must contain every sample once. Otherwise the exit code is 1, and all files are kept for inspection.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.harness import environment
from mc2_hpc.storage import exclusive_folder
from mc2_hpc.training.checkpoint import find_damage
from mc2_hpc.training.checkpoint_folders import complete_folders
from mc2_hpc.training.stop import LOST_RANK, SAVED
from tests.faults import matrix
from tests.faults.diary import EPOCH, account, every_key, history, losses, read_diary, state_hashes
from tests.faults.rows import flip_byte

STEP_SECONDS = 0.2
"""Minimum time of a step in the first run, so that the second takes less time."""
CHECKPOINT_EVERY = 20
WAIT_S = 10
"""A rank that has not responded for this long is considered lost."""
OVERRIDES = ["steps=100000", f"checkpoint.every={CHECKPOINT_EVERY}"]
SIGNALS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP, "term": signal.SIGTERM}
"""Faults that hit a single rank."""
FAULTS = [*SIGNALS, "usr1", "launcher", "damage", "ranks"]


class Soak:
    """The run with faults."""

    def __init__(self, config: Path, folder: Path, seed: int) -> None:
        self._config = config
        self._folder = folder
        self._random = random.Random(seed)
        self._ranks = 2
        self._process: subprocess.Popen[bytes] | None = None
        self.struck: Counter[str] = Counter()

    def run(self, seconds: float, every: float) -> None:
        """Train for ``seconds`` with a fault about every ``every`` seconds, then save."""
        began = time.monotonic()
        next_fault = began + every
        name = self._draw()
        self._start()
        while time.monotonic() - began < seconds:
            time.sleep(0.2)
            if self._process.poll() is not None:
                self._ended()
                self._start()
            if time.monotonic() > next_fault and self._strike(name):
                print(f"{time.monotonic() - began:6.0f} s  {name}", flush=True)
                self.struck[name] += 1
                next_fault += every
                name = self._draw()
        self._stop()

    def close(self) -> None:
        """Kill any process that is still running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for pid in self._rank_pids():
            _kill(pid, signal.SIGKILL)

    def _draw(self) -> str:
        """The next fault; a single rank must not hang, because no other rank would notice."""
        return self._random.choice([name for name in FAULTS if name != "hang" or self._ranks > 1])

    def _start(self) -> None:
        task = matrix.job(
            self._config,
            self._folder,
            processes=self._ranks,
            restarts=1000,
            timeout=WAIT_S,
            step_seconds=STEP_SECONDS,
            overrides=OVERRIDES,
        )
        path = self._folder / "job.json"
        path.write_text(json.dumps(task), encoding="utf-8")
        self._process = subprocess.Popen([*matrix.COMMAND, str(path)], cwd=matrix.ROOT)

    def _ended(self) -> None:
        """Wait until no process uses the run's folder any more."""
        code = self._process.wait(180)
        # A launcher signalled before its handlers are set dies of the signal; ranks whose launcher was killed save.
        if code not in (SAVED, LOST_RANK, -signal.SIGKILL, -signal.SIGTERM):
            log = (self._folder / "log").read_text(encoding="utf-8")[-4000:]
            raise AssertionError(f"exit code {code}\n{log}")
        for pid in self._rank_pids():
            if _is_stopped(pid):  # cannot receive the kernel's signal when its launcher dies; a scheduler would kill it
                _kill(pid, signal.SIGKILL)
        with exclusive_folder(self._folder / "run", wait_s=180):
            pass

    def _stop(self) -> None:
        self._process.terminate()
        self._ended()

    def _strike(self, name: str) -> bool:
        """Inject a fault; returns whether there was anything to break."""
        pids = self._rank_pids()
        if len(pids) < self._ranks:
            return False  # between two starts
        if name in SIGNALS:
            return _kill(self._random.choice(pids), SIGNALS[name])
        if name == "usr1":
            self._process.send_signal(signal.SIGUSR1)
        elif name == "launcher":
            self._process.kill()
        elif name == "damage":
            self._stop()
            whole = _whole_checkpoints(self._folder)
            if len(whole) > 1:
                flip_byte(whole[-1])
            self._start()
            return len(whole) > 1
        else:
            self._stop()
            self._ranks = self._random.choice([n for n in (1, 2, 3) if n != self._ranks])
            self._start()
        return True

    def _rank_pids(self) -> list[int]:
        pids = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue  # exited meanwhile
            if b"--rank" in command and str(self._folder).encode() in command:
                pids.append(int(process.name))
        return sorted(pids)


def _kill(pid: int, number: int) -> bool:
    """Send a signal; returns whether the process still existed."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _is_stopped(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False  # exited meanwhile


def _whole_checkpoints(job: Path) -> list[Path]:
    """Undamaged checkpoints, oldest first; a start that was stopped early may not have replaced a newer damaged one."""
    return [folder for folder in complete_folders(job / "run" / "checkpoints") if find_damage(folder) is None]


def last_step(job: Path) -> int:
    """Step of the newest undamaged checkpoint."""
    return max((int(folder.name[-8:]) for folder in _whole_checkpoints(job)), default=0)


def repeat(config: Path, folder: Path, soaked: Path) -> None:
    """Repeat the steps of ``soaked`` without faults, each on the same number of ranks."""
    kept, last = history(read_diary(soaked)), last_step(soaked)
    starter = matrix.Starter()
    for step in range(1, last + 1):
        if step == last or kept[step + 1].world != kept[step].world:
            task = matrix.job(
                config, folder, processes=kept[step].world, stop_after=step, overrides=[*OVERRIDES, "checkpoint.keep=2"]
            )
            code = starter.run(task)
            if code != SAVED:
                raise AssertionError(f"the undisturbed run ended with exit code {code}; see {folder / 'log'}")


def check(soaked: Path, undisturbed: Path) -> dict[str, Any]:
    """Compare the two runs; returns the figures of the soak.

    Raises:
        AssertionError: a sample, loss, weight or moment differs.
    """
    found, expected = (history(read_diary(folder)) for folder in (soaked, undisturbed))
    steps = range(1, last_step(soaked) + 1)
    assert len(steps) >= EPOCH, f"{len(steps)} steps are less than an epoch: too little time between the faults"
    assert all(step in found and step in expected for step in steps), "steps are missing"
    assert all(found[step].keys[step] == expected[step].keys[step] for step in steps), "samples differ"
    ours, theirs = losses(soaked), losses(undisturbed)
    differing = [step for step in steps if ours.get(step) is None or ours[step] != theirs[step]]
    assert not differing, f"losses differ from step {differing[0]} on, or its row is missing"
    assert state_hashes(soaked, steps[-1]) == state_hashes(undisturbed, steps[-1]), "states differ"
    seen = Counter(key for step in steps[: len(steps) // EPOCH * EPOCH] for key in found[step].keys[step])
    epochs = len(steps) // EPOCH
    lost = sum(max(0, epochs - seen[key]) for key in every_key())
    repeated = sum(max(0, count - epochs) for count in seen.values())
    assert not lost and not repeated, f"{lost} samples lost, {repeated} repeated"
    attempts = read_diary(soaked)
    return {
        "steps": len(steps),
        "starts": len(attempts),
        "steps_lost": account(soaked)["steps_lost"],
        "samples_lost": lost,
        "samples_repeated": repeated,
        "ranks": sorted({attempt.world for attempt in attempts}),
        "equal_bits": True,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=60, metavar="SECONDS", help="time between faults [60]")
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing the faults [0]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    config = matrix.prepare(folder)
    (folder / "soaked").mkdir()
    soak = Soak(config, folder / "soaked", arguments.seed)
    try:
        soak.run(arguments.minutes * 60, arguments.every)
        print("repeating the run undisturbed", flush=True)
        repeat(config, folder / "undisturbed", folder / "soaked")
        row = {**check(folder / "soaked", folder / "undisturbed"), "faults": dict(soak.struck)}
    except BaseException as error:
        print(f"soak: {error!r}; see {folder}", file=sys.stderr)
        if isinstance(error, AssertionError):
            return 1
        raise
    finally:
        soak.close()
    shutil.rmtree(folder)
    print("  ".join(f"{key}={value}" for key, value in row.items()))
    if arguments.json:
        plan = {"minutes": arguments.minutes, "fault_every_seconds": arguments.every, "seed": arguments.seed}
        result = {"name": "soak", "env": environment(), "config": plan, "rows": [row], "ratios": {}}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
