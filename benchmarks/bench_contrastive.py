"""The contrastive losses compared with open_clip's: time, peak memory and achieved rate, by batch size.

    mc2 bench contrastive [--quick] [--json FILE]

One process holds the whole batch (D = 1024; fp32 on a CPU, bf16 on a GPU). Contenders are timed alternately, forward
alone and forward with backward. ``tflops`` counts the 8 B^2 D operations that the loss needs, whatever a contender
actually computes; ``matmul_tflops`` is the rate of a plain matrix product in the same run, an upper bound.
``*_sigmoid`` and siglip-kernel are sigmoid losses, the others softmax. A GPU run adds both variants of the Triton
backend, other launch parameters, and the peers of :data:`GPU_PEERS` that are installed; ``config.missing`` says why one
is left out.
"""

import math
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Rows, alternate, main, peak_memory, print_peak_memory, spread
from mc2_hpc.conversion.peers import import_open_clip
from mc2_hpc.kernels.contrastive import all_gather, contrastive_loss, sigmoid_loss
from mc2_hpc.kernels.contrastive.dispatch import WORKSPACE_BYTES
from mc2_hpc.kernels.contrastive.function import ContrastiveLoss, Plan
from mc2_hpc.kernels.contrastive.launch import Launch
from mc2_hpc.kernels.contrastive.shared_batch import SharedBatch

WIDTH = 1024
LOGIT_SCALE, LOGIT_BIAS = math.log(100), -10.0
PEER = "open_clip"
VARIANTS = {"ours_fused": "descriptor", "ours_chunked": "memory"}
"""Variants of the Triton backend, timed on a GPU in addition to the table's choice, by the source of their products."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

OTHER_LAUNCHES = {
    "statistics_128x128x64_w8": ("statistics", Launch(128, 128, 64, num_warps=8, num_stages=3)),
    "statistics_128x128x128_w8": ("statistics", Launch(128, 128, 128, num_warps=8, num_stages=3)),
    "gradient_256x128x64_w8": ("gradient", Launch(256, 128, 64, num_warps=8, num_stages=4)),
    "gradient_128x128x64_w8": ("gradient", Launch(128, 128, 64, num_warps=8, num_stages=3)),
    "gradient_128x128x64_w4": ("gradient", Launch(128, 128, 64, num_warps=4, num_stages=3)),
}
"""Other launch parameters, timed on a GPU at B = 32768 to choose the table's entries."""


def inputs(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised features of loosely matching pairs, and a logit scale, all requiring gradients."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    image = F.normalize(torch.randn(batch, WIDTH, generator=generator, device=device), dim=1)
    text = F.normalize(image + 0.1 * torch.randn(batch, WIDTH, generator=generator, device=device), dim=1)
    scale = torch.tensor(LOGIT_SCALE, device=device, requires_grad=True)
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), scale


def triton_loss(source: str, launches: dict[tuple[str, str], Launch] | None = None) -> Loss:
    """The Triton backend with dot products from a given source and, optionally, given launch parameters per kernel."""
    from mc2_hpc.kernels.contrastive.triton_impl import TritonTiles

    def make_tiles(image: Tensor, num_columns: int) -> TritonTiles:
        return TritonTiles(image, num_columns, WORKSPACE_BYTES["cuda"], source, launches)

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return ContrastiveLoss.apply(
            image, text, scale, Plan(make_tiles, all_gather, SharedBatch(None, 0, (len(image),)))
        )

    return loss


def _inf_cl() -> Loss:
    from inf_cl import cal_inf_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return (cal_inf_loss(image, text, scale=scale.exp()) + cal_inf_loss(text, image, scale=scale.exp())) / 2

    return loss


def _memeff() -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    # Its temperature is a number without a gradient; ``stable`` would change the size of the others.
    alone = MemoryEfficientCLIPLoss(temperature=math.exp(-LOGIT_SCALE), normalized_inputs=True, stable=False)
    return lambda image, text, scale: alone(image, text) + 0 * scale


def _siglip_kernel() -> Loss:
    from siglip_kernel import fused_siglip_loss

    bias = torch.tensor(LOGIT_BIAS, device="cuda")
    return lambda image, text, scale: fused_siglip_loss(image, text, scale, bias)


GPU_PEERS = {"inf_cl": _inf_cl, "memeff": _memeff, "siglip_kernel": _siglip_kernel}
"""Losses in Triton that need CUDA: Inf-CL, memeff 0.3.1 and siglip-kernel 0.1.2 (the last two are on PyPI)."""


def contenders(device: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """Losses by name, ours and open_clip's first, and why any peer is missing."""
    theirs = import_open_clip().loss
    clip_loss, siglip_loss, bias = theirs.ClipLoss(), theirs.SigLipLoss(), torch.tensor(LOGIT_BIAS, device=device)
    losses: dict[str, Loss] = {
        "ours": contrastive_loss,
        PEER: lambda image, text, scale: clip_loss(image, text, scale.exp()),
        "ours_sigmoid": lambda image, text, scale: sigmoid_loss(image, text, scale, bias),
        f"{PEER}_sigmoid": lambda image, text, scale: siglip_loss(image, text, scale.exp(), bias),
    }
    if device != "cuda":
        return losses, dict.fromkeys(GPU_PEERS, "needs CUDA")
    losses |= {name: triton_loss(source) for name, source in VARIANTS.items()}
    missing = {}
    for name, load in GPU_PEERS.items():
        try:
            losses[name] = load()
        except ImportError as error:
            missing[name] = str(error)
    return losses, missing


def run(quick: bool) -> dict[str, Any]:
    """Rows and ratios for all sizes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ceiling = matmul_rate(device, quick)
    losses, missing = contenders(device)
    rows = Rows()
    for batch in sizes(device, quick):
        # At a million pairs one call takes seconds, so variants and repetitions are skipped.
        several = losses if batch <= 65_536 else {n: f for n, f in losses.items() if n not in VARIANTS}
        rounds = 1 if quick or batch >= 262_144 else 3
        rows += measure(batch, device, several, missing, rounds=rounds, ceiling=ceiling)
    if device == "cuda":
        rows += measure_launches(32_768, missing, rounds=2 if quick else 5, ceiling=ceiling)
    config = {
        "width": WIDTH,
        "dtype": "bf16" if device == "cuda" else "fp32",
        "logit_scale": LOGIT_SCALE,
        "threads": torch.get_num_threads(),
        "matmul_tflops": ceiling,
        "missing": missing,
    }
    return {"config": config, "rows": rows, "ratios": ratios(rows)}


def sizes(device: str, quick: bool) -> list[int]:
    if device == "cuda":
        return [8_192, 32_768] if quick else [2**power for power in range(10, 21)]
    return [1_024, 8_192] if quick else [1_024, 2_048, 4_096, 8_192, 16_384]


def matmul_rate(device: str, quick: bool) -> float:
    """TFLOP/s of a plain product of random matrices in the loss's type."""
    size = 16_384 if device == "cuda" else 2_048
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = alternate({"matmul": lambda: left @ right}, rounds=2 if quick else 10)["matmul"]
    return 2 * size**3 / median(seconds) / 1e12


def measure(
    batch: int, device: str, losses: dict[str, Loss], missing: dict[str, str], *, rounds: int, ceiling: float
) -> list[dict[str, Any]]:
    """A row for each contender that runs at this batch size; the reasons for others are added to ``missing``."""
    tensors = inputs(batch, device)
    memory = {}
    for name in losses:
        try:
            memory[name] = peak_memory(__file__, name, batch, device, both(losses[name], tensors))
        except RuntimeError as error:  # out of memory, or a peer's limits; our own loss must run
            if name == "ours":
                raise
            missing[f"{name}_b{batch}"] = str(error).splitlines()[0]
    fitting = {name: losses[name] for name in memory}

    def forward(loss: Loss) -> Callable[[], object]:
        return lambda: loss(*tensors)

    # On a GPU the memory measurement was the first call at this size; a CPU needs no warm-up for large batches.
    warmup = 1 if batch <= 4_096 else 0
    forward_seconds = alternate({n: forward(loss) for n, loss in fitting.items()}, rounds=rounds, warmup=warmup)
    both_seconds = alternate({n: both(loss, tensors) for n, loss in fitting.items()}, rounds=rounds, warmup=warmup)
    rows = []
    for name in fitting:
        total, first = median(both_seconds[name]), median(forward_seconds[name])
        rows.append(
            {
                "loss": name,
                "batch": batch,
                "seconds": total,
                "forward_seconds": first,
                "backward_seconds": total - first,
                "spread": spread(both_seconds[name]),
                "memory_mb": memory[name] / 2**20,
                "tflops": 8 * batch**2 * WIDTH / total / 1e12,
                "fraction_of_matmul": 8 * batch**2 * WIDTH / total / 1e12 / ceiling,
                "samples": both_seconds[name],
            }
        )
    return rows


def measure_launches(batch: int, missing: dict[str, str], *, rounds: int, ceiling: float) -> list[dict[str, Any]]:
    """Rows for the fused variant, changing the launch parameters of one kernel at a time."""
    losses = {"ours_fused": triton_loss("descriptor")}
    for name, (kernel, launch) in OTHER_LAUNCHES.items():
        losses[name] = triton_loss("descriptor", {(kernel, "descriptor"): launch})
    return measure(batch, "cuda", losses, missing, rounds=rounds, ceiling=ceiling)


def both(loss: Loss, tensors: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    """A call of forward and backward."""
    return lambda: torch.autograd.grad(loss(*tensors), tensors)


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours relative to open_clip's, by batch size; larger is better for speed, smaller for memory."""
    by = {(row["loss"], row["batch"]): row for row in rows}
    result = {}
    for batch in sorted({row["batch"] for row in rows}):
        for kind in ("", "_sigmoid"):
            ours, peer = by.get((f"ours{kind}", batch)), by.get((f"{PEER}{kind}", batch))
            if ours and peer:
                result[f"speed_vs_open_clip{kind}_b{batch}"] = peer["seconds"] / ours["seconds"]
                result[f"vs_open_clip{kind}_b{batch}_memory"] = ours["memory_mb"] / peer["memory_mb"]
        if ours := by.get(("ours", batch)):
            result[f"fraction_of_matmul_peak_b{batch}"] = ours["fraction_of_matmul"]
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak-memory"]:
        loss = contenders("cpu")[0][sys.argv[2]]
        print_peak_memory(lambda batch: both(loss, inputs(batch, "cpu")), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main("contrastive", run)
