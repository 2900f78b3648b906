"""What a process says about this machine."""

import os
import shutil

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.tuning import machines
from mc2_hpc.tuning.machines import examine


def test_this_machine_without_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = examine(2)
    assert (found.device_type, found.ranks, found.ranks_per_node) == ("cpu", 2, 2)
    assert found.cores == len(os.sched_getaffinity(0)) and found.cores_per_rank == max(1, found.cores // 2)
    assert found.memory_bytes is not None and 0 < found.memory_bytes < 1 << 45
    assert not (found.has_triton or found.has_xformers or found.has_dali)
    assert found.can_compile == (shutil.which("g++") is not None)


def test_a_device_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(machines, "_EXAMINE_S", 0.01)
    with pytest.raises(UserError, match="does not answer within 0.01 s"):
        examine(None)
