"""The contrastive loss with a teacher compared with open_clip's DistillClipLoss: time and peak memory, by batch size.

    mc2 bench distillation [--quick] [--json FILE]

One process holds the whole batch. The student has D = 512, the teacher E = 1024 features (B/16 from H/14), in fp32 on a
CPU and bf16 on a GPU. Contenders are timed alternately, forward with backward. ``alone`` is our loss without a teacher:
what the teacher costs.
"""

import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_contrastive import LOGIT_SCALE
from benchmarks.harness import Rows, alternate, main, peak_memory, print_peak_memory, spread
from mc2_hpc.conversion.peers import import_open_clip
from mc2_hpc.kernels.contrastive import Teacher, contrastive_loss, distilled_contrastive_loss

WIDTH, TEACHER_WIDTH = 512, 1024
PEER = "open_clip"

Loss = Callable[[Tensor, Tensor, Tensor, Teacher], Tensor]


def inputs(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor, Teacher]:
    """Normalised features of loosely matching pairs and a logit scale, requiring gradients, and a teacher's."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def pair(width: int) -> tuple[Tensor, Tensor]:
        image = F.normalize(torch.randn(batch, width, generator=generator, device=device), dim=1)
        text = F.normalize(image + 0.1 * torch.randn(batch, width, generator=generator, device=device), dim=1)
        return image.to(dtype), text.to(dtype)

    image, text = pair(WIDTH)
    scale = torch.tensor(LOGIT_SCALE, device=device, requires_grad=True)
    return image.requires_grad_(), text.requires_grad_(), scale, Teacher(*pair(TEACHER_WIDTH))


def contenders() -> dict[str, Loss]:
    """Losses by name, ours first."""
    theirs = import_open_clip().loss.DistillClipLoss()

    def open_clip(image: Tensor, text: Tensor, scale: Tensor, teacher: Teacher) -> Tensor:
        return sum(theirs(image, text, scale.exp(), teacher.image_features, teacher.text_features, teacher.scale))

    return {
        "ours": lambda *inputs: distilled_contrastive_loss(*inputs)[0],
        PEER: open_clip,
        "alone": lambda image, text, scale, _: contrastive_loss(image, text, scale),
    }


def both(loss: Loss, tensors: tuple[Tensor, Tensor, Tensor, Teacher]) -> Callable[[], object]:
    """A call of forward and backward."""
    return lambda: torch.autograd.grad(loss(*tensors), tensors[:3])


def run(quick: bool) -> dict[str, Any]:
    """Rows and ratios for all sizes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    powers = ([13] if quick else range(12, 17)) if device == "cuda" else ([10] if quick else range(10, 14))
    rows = Rows()
    for power in powers:
        rows += measure(2**power, device, rounds=1 if quick else 5)
    config = {"width": WIDTH, "teacher_width": TEACHER_WIDTH, "threads": torch.get_num_threads(), "device": device}
    return {"config": config, "rows": rows, "ratios": ratios(rows)}


def measure(batch: int, device: str, *, rounds: int) -> list[dict[str, Any]]:
    """A row for each contender that runs at this batch size."""
    tensors = inputs(batch, device)
    memory: dict[str, int] = {}
    for name, loss in contenders().items():
        try:
            memory[name] = peak_memory(__file__, name, batch, device, both(loss, tensors))
        except torch.OutOfMemoryError:
            if name != PEER:
                raise
    losses = contenders()
    seconds = alternate({name: both(losses[name], tensors) for name in memory}, rounds=rounds)
    return [
        {
            "loss": name,
            "batch": batch,
            "seconds": median(seconds[name]),
            "spread": spread(seconds[name]),
            "memory_mb": memory[name] / 2**20,
            "samples": seconds[name],
        }
        for name in memory
    ]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours relative to open_clip's, and the time of the loss alone relative to ours, by batch size."""
    by = {(row["loss"], row["batch"]): row for row in rows}
    result = {}
    for batch in sorted({row["batch"] for row in rows}):
        ours, peer, alone = (by.get((name, batch)) for name in ("ours", PEER, "alone"))
        if ours and peer:
            result[f"speed_vs_open_clip_b{batch}"] = peer["seconds"] / ours["seconds"]
            result[f"vs_open_clip_b{batch}_memory"] = ours["memory_mb"] / peer["memory_mb"]
        if ours and alone:
            result[f"speed_vs_alone_b{batch}"] = alone["seconds"] / ours["seconds"]
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak-memory"]:
        loss = contenders()[sys.argv[2]]
        print_peak_memory(lambda batch: both(loss, inputs(batch, "cpu")), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main("distillation", run)
