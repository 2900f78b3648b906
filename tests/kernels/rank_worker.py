"""One gloo rank of the contrastive loss tests: ``rank_worker.py RANK SIZE FOLDER TASK``.

Task ``solve`` computes every case of ``FOLDER/cases.pt`` that this rank belongs to and saves the results. Task
``vanish-<exchange>`` kills the last rank between forward and backward; in ``stall-<exchange>`` the last rank stays
alive without ever calling the loss.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mc2_hpc.kernels.contrastive import Teacher, contrastive_loss, distilled_contrastive_loss, sigmoid_loss


def solve(rank: int, size: int, folder: Path) -> None:
    cases = torch.load(folder / "cases.pt", weights_only=True)
    groups = {n: dist.new_group(range(n)) for n in range(1, size)}
    found = {}
    for name, case in cases.items():
        batches = case["batches"]
        if rank >= len(batches):
            continue
        start = sum(batches[:rank])
        own = slice(start, start + batches[rank])
        scalars = [case[name] for name in ("logit_scale", "logit_bias") if name in case]
        inputs = [case["image"][own], case["text"][own], *scalars]
        inputs = [x.clone().requires_grad_() for x in inputs]
        options = {"group": groups.get(len(batches)), **case["options"]}
        for _ in "ab":
            loss = _loss(inputs, case, own, options)
            result = [loss.detach(), *torch.autograd.grad(loss, inputs)]
            before = found.setdefault(name, result)
            assert all(map(torch.equal, before, result)), f"{name}: two runs differ in bits"
    torch.save(found, folder / f"found-{rank}.pt")


def _loss(inputs: list[torch.Tensor], case: dict, own: slice, options: dict) -> torch.Tensor:
    if "logit_bias" in case:
        return sigmoid_loss(*inputs, **options)
    if "teacher" not in case:
        return contrastive_loss(*inputs, **options)
    image, text, scale, weight = case["teacher"]
    loss, terms = distilled_contrastive_loss(*inputs, Teacher(image[own], text[own], scale, weight), **options)
    torch.testing.assert_close(loss.detach(), terms[0] + weight * terms[1], rtol=1e-5, atol=0)
    return loss


def mismatch(rank: int) -> None:
    """Ranks whose features differ in width must all report it, those of a teacher too."""
    same, different = torch.ones(2, 3), torch.ones(2, 3 + rank)
    scale = torch.tensor(0.0)
    for call in (
        lambda: contrastive_loss(different, different, scale),
        lambda: distilled_contrastive_loss(same, same, scale, Teacher(different, different)),
    ):
        try:
            call()
        except ValueError as error:
            print(error, flush=True)


def fail(rank: int, size: int, task: str) -> None:
    what, exchange = task.split("-", 1)
    image, text = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    last = rank == size - 1
    if last and what == "stall":
        time.sleep(60)
    loss = contrastive_loss(image, text, torch.tensor(1.0), exchange=exchange)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        loss.backward()
    finally:
        print(f"rank {rank} came back", flush=True)


def main() -> None:
    rank, size, folder, task = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    seconds = 3 if task.startswith("stall") else 60
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    if task == "solve":
        solve(rank, size, folder)
    elif task == "mismatch":
        mismatch(rank)
    else:
        fail(rank, size, task)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
