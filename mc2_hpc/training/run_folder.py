"""The folder of one run, which one job at a time may train into."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mc2_hpc.distributed import Ranks, on_first_rank
from mc2_hpc.errors import UserError
from mc2_hpc.storage import exclusive_folder


@contextmanager
def exclusive_run(output: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the run's folder against another job that would train into it (such as ranks whose launcher was killed).

    Collective.

    Raises:
        UserError: another job holds it, or it cannot be written.
    """
    with ExitStack() as stack:

        def hold() -> None:
            try:
                stack.enter_context(exclusive_folder(output))
            except OSError as error:
                raise UserError(f"output={output}: cannot be written: {error.strerror or error}") from None

        on_first_rank(ranks, hold)
        yield
