"""The run folder, into which only one job at a time may train, and the record of how each start ends."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mc2_hpc.config import RunConfig
from mc2_hpc.distributed import Ranks, on_first_rank
from mc2_hpc.errors import UserError
from mc2_hpc.storage import exclusive_folder
from mc2_hpc.training.lost_rank import LostRankError
from mc2_hpc.training.run_state import RunState, begun, ended, read_state, write_state
from mc2_hpc.training.stop import Stopped
from mc2_hpc.training.trainer import NonFiniteError, SaveError


@contextmanager
def exclusive_run(output: Path, ranks: Ranks) -> Iterator[None]:
    """Lock the run folder against other jobs that would train into it (such as ranks whose launcher was killed).

    Collective.

    Raises:
        UserError: another job holds the lock, or the folder cannot be written.
    """
    with ExitStack() as stack:

        def hold() -> None:
            try:
                stack.enter_context(exclusive_folder(output))
            except OSError as error:
                raise UserError(f"output={output}: cannot be written: {error.strerror or error}") from None

        on_first_rank(ranks, hold)
        yield


@contextmanager
def recorded_start(config: RunConfig, ranks: Ranks) -> Iterator[None]:
    """Record in ``state.json`` that the run has started and, in the end, how it ended; lets exceptions pass."""
    folder = Path(config.output)
    state = None
    if ranks.is_first:
        state = begun(folder, steps=config.steps, global_batch=config.global_batch, ranks=ranks.world_size)
        write_state(folder, state)
    try:
        yield
    except Stopped as stopped:
        if state is not None:
            write_state(folder, ended(state, "saved", message=str(stopped)))
        raise
    except BaseException as error:
        _record_failure(folder, state, error, rank=ranks.rank)
        raise
    if state is not None:
        write_state(folder, ended(state, "finished"))


def _record_failure(folder: Path, state: RunState | None, error: BaseException, *, rank: int) -> None:
    """Write the error of the rank that failed first, which others only notice by losing it.

    It is written before that rank leaves the process group, so it is there when the first rank has lost it.
    """
    own = type(error).__module__.startswith("mc2_hpc.")
    text = str(error) if own else f"{type(error).__name__}: {error}"
    if state is None:
        # The first rank has these too.
        if not isinstance(error, LostRankError | UserError | NonFiniteError | SaveError):
            _record_other_rank(folder, f"rank {rank}: {text}")
        return
    if isinstance(error, LostRankError):
        found = _state_now(folder)
        if found is not None and (found.started, found.state) == (state.started, "failed"):
            return
    write_state(folder, ended(state, "failed", message=text))


def _record_other_rank(folder: Path, text: str) -> None:
    found = _state_now(folder)
    if found is not None and found.state == "running":
        write_state(folder, ended(found, "failed", message=text))


def _state_now(folder: Path) -> RunState | None:
    try:
        return read_state(folder)
    except UserError:
        return None
