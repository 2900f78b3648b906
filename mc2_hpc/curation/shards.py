"""Running a stage over shards: finished shards are skipped, broken ones are named at the end, the rest is done.

A shard's outputs are files of their own, each written atomically; its ``stats/<shard>.json`` is written last and so
marks it as finished. A stage's settings lie beside them, and other settings are refused rather than mixed in.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from mc2_hpc.errors import UserError
from mc2_hpc.storage import read_json, write_json

Progress = Callable[[str, int, int, str], None]
"""Called with (stage, shards done, shards in all, name of the shard just done or "" for those done before)."""

_SHOWN_FAILURES = 3
_Input = TypeVar("_Input")
_Result = tuple[str, UserError | None]


def stats_path(out: Path, shard: str) -> Path:
    """The file that marks a shard of the stage in ``out`` as finished and holds its counters."""
    return out / "stats" / f"{shard}.json"


def open_stage(out: Path, file: str, settings: Mapping[str, Any], shards: Sequence[str]) -> None:
    """Record ``settings`` and the shards in ``out/file``, or check that they are those recorded before.

    Raises:
        UserError: the folder was made with other settings.
    """
    path = out / file
    if path.is_file():
        before = read_json(path)
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise UserError(
                f"{path}: this folder was made with another {', '.join(changed)}; name another folder or delete it"
            )
    write_json(path, {**settings, "shards": list(shards)})


def run_shards(
    shards: Mapping[str, _Input],
    work: Callable[[str, _Input], object],
    is_done: Callable[[str], bool],
    *,
    stage: str,
    workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Call ``work(name, input)`` for every shard that is not done.

    Args:
        shards: input of each shard by name.
        work: picklable if ``workers`` > 1; raises :class:`UserError` for a shard it cannot read.
        workers: processes; 1 works in this one.

    Raises:
        UserError: some shards could not be done (every other one is), or a worker process died.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: must be at least 1")
    todo = {name: value for name, value in shards.items() if not is_done(name)}
    done = len(shards) - len(todo)
    if progress and done:
        progress(stage, done, len(shards), "")
    alone = workers == 1 or len(todo) <= 1
    results = _in_this_process(todo, work) if alone else _in_processes(todo, work, workers, stage)
    failures: list[tuple[str, UserError]] = []
    for name, error in results:
        if error is not None:
            failures.append((name, error))
        done += 1
        if progress:
            progress(stage, done, len(shards), name)
    if failures:
        shown = "; ".join(str(error) for _, error in sorted(failures, key=lambda f: f[0])[:_SHOWN_FAILURES])
        more = f" (and {len(failures) - _SHOWN_FAILURES} more)" if len(failures) > _SHOWN_FAILURES else ""
        raise UserError(
            f"{stage}: {len(failures)} of {len(shards)} shards failed, the others are done: {shown}{more}; "
            "mend or remove these and run the same command again"
        )


def _in_this_process(todo: Mapping[str, _Input], work: Callable[[str, _Input], object]) -> Iterator[_Result]:
    for name, value in todo.items():
        yield name, _attempt(work, name, value)


def _in_processes(
    todo: Mapping[str, _Input], work: Callable[[str, _Input], object], workers: int, stage: str
) -> Iterator[_Result]:
    """As :func:`_in_this_process`, in ``workers`` processes, in order of completion."""
    # Not forked: Arrow's thread pool does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
        queue = iter(todo.items())
        running: dict[Future[UserError | None], str] = {}
        try:
            while True:
                for name, value in queue:
                    running[pool.submit(_attempt, work, name, value)] = name
                    if len(running) >= 2 * workers:  # enough to keep them busy, and no more in memory
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
        except BrokenProcessPool:
            raise UserError(
                f"{stage}: a worker process died, probably out of memory, near shard {min(running.values())!r}; "
                "finished shards are kept: run the same command again with fewer workers"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _attempt(work: Callable[[str, _Input], object], name: str, value: _Input) -> UserError | None:
    try:
        work(name, value)
    except UserError as error:
        return error
    return None
