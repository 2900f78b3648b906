"""The fuzz lane: thousands of damaged inputs of every kind through every command, each in its own process.

    python -m tests.fuzz.lane --inputs 2000 --jobs 2 --json runs/fuzz.json

An input is a copy of a small valid world (``world.py``) with one thing damaged (``mutations.py``): a file, an override,
a flag or the environment. A command then either does its work and counts what it left out (exit code 0), or says in one
line what is wrong (exit code 2, or 1 for a run that failed). Everything else is a fault: a traceback, a signal, more
than :data:`SECONDS` or :data:`MEMORY_BYTES`, several lines, or numbers that silently differ from the valid input's. The
process that imports everything forks for each input, so that an input takes a fraction of a second.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import environment
from mc2_hpc.storage import write_json
from tests.fuzz import mutations, world
from tests.fuzz.commands import COMMANDS, Command

SECONDS = 60
ENDINGS = {"one line": "one line, exit code 1 or 2", "done": "done, the rest counted"}
"""Outcomes that are not faults, and their headings in the table."""
MEMORY_BYTES = 2 << 30
"""Beyond the memory of the process that forks."""


@dataclass
class Result:
    """The outcome of one input."""

    number: int
    command: str
    kind: str
    what: str
    outcome: str
    seconds: float
    detail: str = ""


class Lane:
    """Runs inputs through commands, one after another; every input is a function of the seed and its number."""

    def __init__(self, valid: Path, seed: int) -> None:
        self._valid, self._seed = valid, seed
        self._expected: dict[str, str] = {}

    def expect(self) -> None:
        """Record what each command prints for the valid world.

        Raises:
            SystemExit: a command refuses it.
        """
        for name, command in COMMANDS.items():
            with self._copy() as folder:
                code, out, err, _ = self._run(folder, command.words.split(), {})
                if code != 0:
                    raise SystemExit(f"{name}: the valid input ends in {code}: {err[-2000:]}")
                self._expected[name] = _numbers(out)
                _import_all(json.loads((folder / ".modules").read_text()))

    def run(self, number: int) -> Result:
        rng = random.Random(f"{self._seed}/{number}")
        name = rng.choices(list(COMMANDS), [command.often for command in COMMANDS.values()])[0]
        command = COMMANDS[name]
        with self._copy() as folder:
            words, environment = command.words.split(), {}
            kind, what, retyped = self._damage(command, folder, words, environment, rng)
            start = time.monotonic()
            code, out, err, peak = self._run(folder, words, environment)
            seconds = time.monotonic() - start
        outcome, detail = _verdict(code, err, peak, seconds)
        if outcome == "done" and command.scores and retyped and not re.search("skipped|left out|without", out + err):
            if _numbers(out) != self._expected[name]:
                outcome, detail = "numbers believed", out[-300:]
        return Result(number, name, kind, what, outcome, round(seconds, 2), detail)

    def _damage(
        self, command: Command, folder: Path, words: list[str], environment: dict[str, str], rng: random.Random
    ) -> tuple[str, str, bool]:
        choices = ["file"] * 8 + ["override"] * (4 * command.overrides) + ["flag"] * (1 if command.flags else 0)
        chosen = rng.choice([*choices, "environment"])
        if chosen == "override":
            words.append(mutations.override(rng))
            return "override", words[-1][:80], False
        if chosen == "flag":
            words += mutations.flag(rng, command.flags)
            return "flag", words[-1][:80], False
        if chosen == "environment":
            environment.update(mutations.environment(rng))
            return "environment", str(environment)[:80], False
        pattern = rng.choice(list(command.files))
        paths = sorted(path for path in folder.glob(pattern) if path.is_file())
        if not paths:
            raise SystemExit(f"{command.words}: the valid world has no {pattern}")
        path = rng.choice(paths)
        change = rng.choice(mutations.BY_KIND[command.files[pattern]])
        try:
            what = change(path, rng)
        except (UnicodeEncodeError, ValueError) as error:  # what cannot be written is not an input
            what = f"nothing ({type(error).__name__})"
        retyped = change in (mutations.change_json, mutations.change_parquet) and not re.search(
            "removed|strange|renamed|no rows|some null|nothing", what
        )
        return command.files[pattern], f"{path.relative_to(folder)}: {what}", retyped

    def _copy(self) -> "_Folder":
        return _Folder(self._valid)

    def _run(self, folder: Path, words: list[str], environment: dict[str, str]) -> tuple[int, str, str, int]:
        """Exit code (negative: a signal; -999: it took too long), both streams, and peak memory."""
        child = os.fork()
        if child == 0:
            _child(folder, words, environment, keep_modules=not self._expected.keys() >= COMMANDS.keys())
        deadline = time.monotonic() + SECONDS
        status: int | None = None
        usage: Any = None
        while status is None and time.monotonic() < deadline:
            found, found_status, usage = os.wait4(child, os.WNOHANG)
            if found:
                status = found_status
            else:
                time.sleep(0.005)
        if status is None:
            os.killpg(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
            code = -999
        else:
            code = os.waitstatus_to_exitcode(status)
        texts = [(folder / name).read_text(encoding="utf-8", errors="replace") for name in (".stdout", ".stderr")]
        return code, texts[0], texts[1], usage.ru_maxrss * 1024


class _Folder:
    """A copy of the valid world, removed at the end."""

    def __init__(self, valid: Path) -> None:
        self._valid = valid

    def __enter__(self) -> Path:
        self._place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        return Path(shutil.copytree(self._valid, self._place / "w", symlinks=True))

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._place, ignore_errors=True)


def _child(folder: Path, words: list[str], environment: dict[str, str], keep_modules: bool) -> None:
    """Run a command in its own process group and exit."""
    os.setsid()
    os.chdir(folder)
    for number, name in ((0, "/dev/null"), (1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, resource.RLIM_INFINITY))
    code = 70
    try:
        os.environ.update({"XDG_CACHE_HOME": str(folder / ".cache"), "COLUMNS": "100", **environment})
        from mc2_hpc.cli import main

        code = main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 70
    except BaseException:
        traceback.print_exc()
    if keep_modules:
        Path(".modules").write_text(json.dumps(list(sys.modules)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _import_all(names: list[str]) -> None:
    """Import what a command imported, so that the next one has it."""
    for name in names:
        if name not in sys.modules and not name.startswith("_"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


_LOGGED = re.compile(r"\d\d:\d\d:\d\d [IWE] |\[rank\d|\[W\d|\[20\d\d-|[\w ,-]+: \d+(/\d+)?(, .*)?$|step \d+/|\s*$")
"""Log and progress lines, which may come before the one line."""


def _verdict(code: int, err: str, peak: int, seconds: float) -> tuple[str, str]:
    tail = err.strip()[-1500:]
    if code == -999:
        return "too long", tail
    if code < 0:
        return f"signal {-code}", tail
    if "Traceback" in err:
        return "traceback", tail
    if peak > _base_memory() + MEMORY_BYTES:
        return "memory", f"{peak / 1e9:.1f} GB"
    said = [line for line in err.splitlines() if not _LOGGED.match(line)]
    if code == 0:
        return "done", ""
    if code not in (1, 2) or len(said) != 1 or not said[0].startswith("mc2: ") or len(said[0]) > 1000:
        return "several lines" if code in (1, 2) else f"exit code {code}", tail
    return "one line", said[0]


def _base_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _numbers(text: str) -> str:
    return " ".join(re.findall(r"\d+\.\d+", text))


def warm_up() -> None:
    """Import what commands import. Nothing is computed, because threads do not survive a fork."""
    import torch

    torch.set_num_threads(1)
    # Imported later by the first layer on torch's meta device, by DeepSpeed, and by the first summary written.
    import torch._dynamo
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    from mc2_hpc import filters  # noqa: F401
    from mc2_hpc.ablation import run
    from mc2_hpc.curation import decontaminate, dedup_images, deduplicate, extract, filter  # noqa: F401
    from mc2_hpc.curation import run as curation_run  # noqa: F401
    from mc2_hpc.curation.report import page  # noqa: F401
    from mc2_hpc.evaluation import search, suite  # noqa: F401
    from mc2_hpc.jobs import executors  # noqa: F401
    from mc2_hpc.metadata import build  # noqa: F401
    from mc2_hpc.training import trainer  # noqa: F401

    # Only reading an ablation is tested; its rows are training runs, which have their own commands.
    run._plan = lambda *_: sys.exit(0)


def in_child(function: Any, *arguments: Any) -> Any:
    """Call ``function`` in a forked process, which may start threads; the result is returned through a pipe."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 1
        try:
            result = function(*arguments)
            with os.fdopen(write, "w") as stream:
                json.dump(result, stream)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise SystemExit(f"{function.__name__} failed")
    return json.loads(text)


def share(valid: str, seed: int, numbers: list[int], show: bool) -> list[dict[str, Any]]:
    """The results of some inputs."""
    lane = Lane(Path(valid), seed)
    lane.expect()
    results = []
    for number in numbers:
        result = lane.run(number)
        results.append(vars(result))
        if show and result.outcome not in ENDINGS:
            print(
                f"{number}: {result.command}: {result.what}: {result.outcome}\n{result.detail}\n",
                file=sys.stderr,
                flush=True,
            )
    return results


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Number of inputs by kind and outcome."""
    outcomes = [*ENDINGS, *sorted({result["outcome"] for result in results} - ENDINGS.keys())]
    counts = Counter((result["kind"], result["outcome"]) for result in results)
    kinds = sorted({result["kind"] for result in results})
    return [{"input": kind, **{outcome: counts[kind, outcome] for outcome in outcomes}} for kind in kinds]


def table(found: list[dict[str, Any]]) -> str:
    """:func:`rows` as Markdown."""
    outcomes = [*ENDINGS, *sorted(found[0].keys() - {"input", *ENDINGS})]
    head = [
        f"| input | {' | '.join(ENDINGS.get(name, name) for name in outcomes)} |",
        f"|---|{'---:|' * len(outcomes)}",
    ]
    body = [f"| {row['input']} | {' | '.join(str(row[name]) for name in outcomes)} |" for row in found]
    total = " | ".join(str(sum(row[name] for row in found)) for name in outcomes)
    return "\n".join([*head, *body, f"| all | {total} |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to rerun one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    warm_up()
    if os.access("/dev/shm", os.W_OK):
        tempfile.tempdir = "/dev/shm"  # the worlds are small, and commands force what they write to the disk
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        valid = Path(folder) / "valid"
        valid.mkdir()
        numbers = range(arguments.first, arguments.first + arguments.inputs)
        parts = [list(numbers[job :: arguments.jobs]) for job in range(arguments.jobs)]
        from concurrent.futures import ThreadPoolExecutor

        with _image_server(valid / "images") as port, ThreadPoolExecutor(arguments.jobs) as pool:
            in_child(_build, str(valid), port)
            shares = pool.map(lambda part: in_child(share, str(valid), arguments.seed, part, True), parts)
            results = sorted((row for rows in shares for row in rows), key=lambda row: row["number"])
    seconds = time.monotonic() - start
    found = rows(results)
    print(f"{table(found)}\n\n{len(results)} inputs of seed {arguments.seed} in {seconds:.0f} s")
    faults = [row for row in results if row["outcome"] not in ENDINGS]
    if arguments.json:
        plan = {"inputs": len(results), "seed": arguments.seed, "jobs": arguments.jobs}
        result = {"name": "fuzz", "env": environment(), "quick": False, "config": plan, "rows": found, "ratios": {}}
        write_json(arguments.json, {**result, "seconds": round(seconds), "faults": faults})
    return 1 if faults else 0


def _build(valid: str, port: int) -> None:
    os.chdir(valid)
    world.build(Path(valid), port)


@contextlib.contextmanager
def _image_server(folder: Path) -> Iterator[int]:
    """A web server of the files in ``folder``, in its own process; yields its port."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"port (\d+)", server.stdout.readline())
            assert found is not None, "the web server does not start"
            yield int(found[1])
        finally:
            server.terminate()


if __name__ == "__main__":
    sys.exit(main())
