"""The run folder, into which only one job at a time may train."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mc2_hpc.distributed import Ranks, on_first_rank
from mc2_hpc.errors import UserError
from mc2_hpc.storage import exclusive_folder


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
