"""Sums drawn parts with every placement of a job's ranks on nodes; each rank writes its pieces.

python -m torch.distributed.run --standalone --nproc-per-node 6 exchange_worker.py OUT
"""

import dataclasses
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mc2_hpc.distributed import process_group
from mc2_hpc.training.piece_sums import NodeExchange, ReduceScatter

RANKS, ELEMENTS = 6, 60
PLACEMENTS = (1, 2, 3, 6)
"""Ranks of a node."""


def part(rank: int, number: int) -> Tensor:
    """What a rank adds to one of two sums."""
    generator = torch.Generator().manual_seed(10 * rank + number)
    return torch.randn(ELEMENTS, generator=generator)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with process_group(timeout_s=120) as ranks:
        assert ranks.per_node == RANKS  # all are on this machine
        parts = [part(ranks.rank, number) for number in (0, 1)]
        pieces = {"fp32": ReduceScatter(parts[0]).piece()}
        for per_node in PLACEMENTS:
            exchange = NodeExchange(dataclasses.replace(ranks, per_node=per_node))
            summing = [exchange.start(each.bfloat16()) for each in parts]
            for each in summing:
                each.advance()
                each.advance()  # as often as one likes
            pieces |= {f"{per_node}.{number}": each.piece() for number, each in enumerate(summing)}
        save_file(pieces, out / f"rank{ranks.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
