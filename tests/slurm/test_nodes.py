"""Which ranks share a node, as a real Slurm places them."""

import socket
import sys

import pytest

CODE = """
import torch
from mc2_hpc.distributed import process_group
from mc2_hpc.training.piece_sums import NodeExchange
with process_group(60) as ranks:
    exchange = NodeExchange(ranks)
    summing = exchange.start(torch.arange(8).bfloat16() + ranks.rank)
    summing.advance()
    print(ranks.rank, ranks.per_node, exchange.within is not None, summing.piece().tolist())
"""


@pytest.mark.parametrize("distribution, per_node", [("block", 2), ("cyclic", 1)])
def test_ranks_know_how_many_share_their_node(slurm_cluster, distribution, per_node):
    """Dealt to the nodes in turn, they do not, and all exchange with all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    placement = ["--nodes=2", "--ntasks-per-node=2", f"--distribution={distribution}"]
    variables = f"--export=ALL,MASTER_ADDR=127.0.0.1,MASTER_PORT={port},OMP_NUM_THREADS=1"
    told = slurm_cluster.command("srun", *placement, variables, sys.executable, "-c", CODE)
    sums = [[6.0 + 4 * element for element in (2 * rank, 2 * rank + 1)] for rank in range(4)]
    assert sorted(told.splitlines()) == [f"{rank} {per_node} {per_node > 1} {sums[rank]}" for rank in range(4)]
