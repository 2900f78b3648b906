"""What the machine of a run offers: the ranks' device, memory and cores, and the packages that some settings need."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch

from mc2_hpc.data.decode import has_dali
from mc2_hpc.errors import UserError
from mc2_hpc.kernels.triton_launch import triton_obstacle
from mc2_hpc.planning.plan import RESERVE_BYTES
from mc2_hpc.reading.files import read_text

_EXAMINE_S = 300
"""Longest wait for a process that looks at its machine: it imports torch."""
HOST_RESERVE_BYTES = 1 << 30
"""Memory of a rank on a CPU that is not in its trace: Python, PyTorch, DeepSpeed and the decoding processes."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the ranks of a run are."""

    device_type: str
    """``cuda`` or ``cpu``."""
    name: str
    ranks: int
    """Of the run."""
    ranks_per_node: int
    cores: int
    """Of a node."""
    memory_bytes: int | None
    """That a rank may use; None if it is not known."""
    has_triton: bool = False
    has_xformers: bool = False
    has_dali: bool = False
    can_compile: bool = False

    @property
    def cores_per_rank(self) -> int:
        return max(1, self.cores // self.ranks_per_node)


def examine(ranks: int | None) -> Machine:
    """This machine with that many ranks; None is one per GPU, or a single one without GPUs.

    Another process looks, so that this one holds no memory of a GPU while trials run.

    Raises:
        UserError: the GPU cannot be used.
    """
    command = [sys.executable, "-m", "mc2_hpc.tuning.machines", *([] if ranks is None else [str(ranks)])]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_EXAMINE_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"this machine's device does not answer within {_EXAMINE_S} s; try `mc2 doctor`") from None
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"this machine's device cannot be used: {reason}; try `mc2 doctor`")
    return Machine(**json.loads(result.stdout.splitlines()[-1]))


def _this_machine(ranks: int | None) -> Machine:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = ranks or max(1, gpus)
    if gpus:
        properties = torch.cuda.get_device_properties(0)
        return Machine(
            device_type="cuda",
            name=properties.name,
            ranks=ranks,
            ranks_per_node=ranks,
            cores=_cores(),
            memory_bytes=properties.total_memory - RESERVE_BYTES,
            **packages("cuda"),
        )
    available = _available_bytes()
    return Machine(
        device_type="cpu",
        name=f"{os.uname().machine}, {_cores()} cores",
        ranks=ranks,
        ranks_per_node=ranks,
        cores=_cores(),
        memory_bytes=None if available is None else max(0, available // ranks - HOST_RESERVE_BYTES),
        **packages("cpu"),
    )


def packages(device_type: str) -> dict[str, bool]:
    """Which of the packages that :class:`Machine` asks for can be used on a device."""
    cuda = device_type == "cuda"
    triton = cuda and triton_obstacle(torch.device("cuda")) is None
    return {
        "has_triton": triton,
        "has_xformers": cuda and importlib.util.find_spec("xformers") is not None,
        "has_dali": cuda and has_dali(),
        # torch.compile writes Triton for a GPU, and C++ for a CPU.
        "can_compile": triton if cuda else shutil.which(os.environ.get("CXX", "g++")) is not None,
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _available_bytes() -> int | None:
    """Memory that can be used without swapping; None if the system does not say."""
    try:
        lines = read_text("/proc/meminfo", most=1 << 20).splitlines()
    except ValueError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return int(found[1]) * 1024 if found is not None else None


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_this_machine(int(sys.argv[1]) if len(sys.argv) > 1 else None))))
