"""Telling a lost rank from every other failure, and reporting what this rank was waiting for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# gloo raises plain RuntimeErrors, which only their text identifies; NCCL raises a DistError, or its watchdog ends the
# process and logs the collective.
_GLOO_WORDS = ("/gloo/", "Application timeout caused pair closure", "Connection closed by peer", "Connection reset")


class LostRankError(RuntimeError):
    """Another rank or this rank's device is gone; a restart may help."""


@contextmanager
def naming_the_wait(rank: int | str, doing: Callable[[], str]) -> Iterator[None]:
    """Turn exceptions of the communication libraries into a :class:`LostRankError`.

    Args:
        doing: what it was waiting for, such as "in step 12".

    Raises:
        LostRankError: gives this rank, what it was waiting for, and the library's reason in one line.
    """
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        if isinstance(error, torch.AcceleratorError):
            lost = "its device"
        elif isinstance(error, dist.DistError) or any(words in str(error) for words in _GLOO_WORDS):
            lost = "another rank"
        else:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LostRankError(f"rank {rank} lost {lost} {doing()}: {reason}") from error
