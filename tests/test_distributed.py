"""Which processes are ranks: those started by torchrun or srun, not any process inside a Slurm allocation."""

import subprocess
import sys

import pytest

from mc2_hpc.distributed import ranks_per_node

CODE = """
from mc2_hpc.distributed import process_group
with process_group() as ranks:
    print(ranks.rank, ranks.world_size)
"""
SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_TASKS_PER_NODE": "8"}


@pytest.mark.parametrize(
    "environment, code, told",
    [
        (SHELL, 0, "0 1"),  # salloc's shell
        ({**SHELL, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 0, "0 1"),  # the body of a batch script
        ({**SHELL, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, 0, "0 1"),  # an interactive step
        ({**SHELL, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}, 1, "8 processes but MASTER_ADDR"),
    ],
)
def test_only_the_tasks_of_a_slurm_step_are_ranks(environment, code, told):
    environment = {"PATH": "/usr/bin:/bin", **environment}
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == code and told in run.stdout + run.stderr, run.stderr


@pytest.mark.parametrize(
    "local_ranks, per_node",
    [
        ([0], 1),
        ([0, 1, 2], 3),
        ([0, 1, 0, 1, 0, 1], 2),
        ([0, 0, 0], 1),
        ([0, 0, 1, 1], 1),  # dealt to the nodes in turn
        ([0, 1, 2, 0, 1], 1),  # not as many on every node
        ([1, 0, 1, 0], 1),
    ],
)
def test_nodes_are_told_from_local_ranks_where_they_are_alike(local_ranks, per_node):
    assert ranks_per_node(local_ranks) == per_node
