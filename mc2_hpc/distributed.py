"""Process group, rank and world size, the same whether the process was launched by torchrun, by srun or alone."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mc2_hpc.errors import UserError

DEFAULT_TIMEOUT_S = 600
"""No collective waits longer than this many seconds for a missing rank."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the process group."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Longest wait of a collective for a missing rank, for process groups that are created later."""
    per_node: int = 1
    """Ranks of every node, where all nodes have as many, one node's after the other's; otherwise 1."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all (terminal, logs, shared files)."""
        return self.rank == 0


_MOST_RANKS = 1 << 20


def _from_environment(name: str, slurm_name: str, default: int, *, low: int, high: int) -> int:
    named = name if name in os.environ or slurm_name not in os.environ else slurm_name
    text = os.environ.get(named, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text, flags=re.ASCII) or not low <= int(text) <= high:
        raise UserError(f"environment variable {named}={text[:40]!r}: must be a whole number from {low} to {high}")
    return int(text)


def _facts() -> tuple[int, int, int]:
    """Rank, world size and local rank from the environment.

    Raises:
        UserError: one is not a number, or out of range.
    """
    world_size = _from_environment("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1, low=1, high=_MOST_RANKS)
    rank = _from_environment("RANK", "SLURM_PROCID", 0, low=0, high=world_size - 1)
    return rank, world_size, _from_environment("LOCAL_RANK", "SLURM_LOCALID", 0, low=0, high=world_size - 1)


@contextmanager
def process_group(timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[Ranks]:
    """Join the process group that the environment describes; leave it at the end.

    torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) come first, then those that srun sets
    for the tasks of a step. Without either, as in the shell of an allocation, the process is alone and needs no port.
    Uses NCCL on GPUs and gloo on CPUs.

    Raises:
        UserError: a variable is not a number or out of range, there are several processes but no MASTER_ADDR, or there
            are more local ranks than GPUs.
    """
    rank, world_size, local_rank = _facts()
    device = _device(local_rank)
    if world_size > 1:
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            raise UserError(
                f"{world_size} processes but MASTER_ADDR/MASTER_PORT are not set: launch with torchrun, "
                f"`mc2 train --processes`, or slurm/train.sbatch"
            )
        _from_environment("MASTER_PORT", "", 0, low=1, high=65_535)
        store, address = None, "env://"
    else:
        store, address = dist.HashStore(), None
    # DeepSpeed reads these from the environment.
    facts = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank)}
    before = {name: os.environ.get(name) for name in facts}
    os.environ.update(facts)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        init_method=address,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        yield Ranks(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            device=device,
            timeout_s=timeout_s,
            per_node=ranks_per_node(_local_ranks(local_rank, world_size)),
        )
    finally:
        dist.destroy_process_group()
        # Processes started later are not ranks of this group.
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _local_ranks(own: int, world_size: int) -> list[int]:
    """Of every rank in order. Collective."""
    found = [own] * world_size
    if world_size > 1:  # alone, a process on a GPU may never need NCCL and its memory
        dist.all_gather_object(found, own)
    return found


def ranks_per_node(local_ranks: list[int]) -> int:
    """:attr:`Ranks.per_node`, from the local rank of every rank in order."""
    per_node = max(local_ranks) + 1
    regular = local_ranks == [rank % per_node for rank in range(len(local_ranks))]
    return per_node if regular and len(local_ranks) % per_node == 0 else 1


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} but this machine has {torch.cuda.device_count()} GPU(s): "
            f"start one process per GPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def first_error(error: Exception | None) -> None:
    """Tell every rank whether any rank failed, so that all stop together instead of waiting for the failed one.

    Collective. Raises this rank's own ``error``; on the other ranks, a ``UserError`` (if the error is one) or
    ``RuntimeError`` that names the first rank that failed.
    """
    found: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (isinstance(error, UserError), f"{error}" or repr(error)) if error else None)
    if error is not None:
        raise error
    for rank, failure in enumerate(found):
        if failure is not None:
            by_user, message = failure
            raise (UserError if by_user else RuntimeError)(f"rank {rank} failed: {message}")


def on_first_rank(ranks: Ranks, work: Callable[[], None]) -> None:
    """Run ``work`` on the first rank while the others wait. Collective; raises like :func:`first_error`."""
    error: Exception | None = None
    if ranks.is_first:
        try:
            work()
        except Exception as failure:  # whatever it is, the other ranks must know
            error = failure
    first_error(error)
