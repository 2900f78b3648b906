"""Runs traces in processes of their own, because a trace changes global state of torch and DeepSpeed."""

import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mc2_hpc.errors import UserError

T = TypeVar("T")
SECONDS = 600
"""Longest wait for one trace."""


def in_processes(function: Callable[..., T], calls: Sequence[dict[str, Any]]) -> list[T]:
    """``[function(**arguments) for arguments in calls]``, each in a fork of this process, one per core at a time.

    Raises:
        UserError: as ``function`` does.
        RuntimeError: a process died or took longer than :data:`SECONDS`.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for one, and says so on standard output
    import deepspeed  # here, once for all forks

    deepspeed.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by deprecated names; users can do nothing about that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    context = multiprocessing.get_context("fork")
    with context.Pool(min(len(calls), os.cpu_count() or 1), maxtasksperchild=1) as pool:
        pending = [pool.apply_async(_caught, (function, arguments)) for arguments in calls]
        try:
            answers = [each.get(SECONDS) for each in pending]
        except multiprocessing.TimeoutError:
            raise RuntimeError(f"a trace took longer than {SECONDS} s") from None
    found = []
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
        found.append(answer)
    return found


def _caught(function: Callable[..., T], arguments: dict[str, Any]) -> T | Exception:
    try:
        return function(**arguments)
    except UserError as error:
        return error
    except Exception as error:  # some of torch's exceptions cannot be sent to another process
        return RuntimeError(f"{type(error).__name__}: {error}")
