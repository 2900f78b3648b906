"""Trains 20 steps with every optimizer and stage, half of them after a resume.

python -m torch.distributed.run --standalone --nproc-per-node 2 backend_worker.py OUT
"""

import json
import sys
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file

from mc2_hpc.config import RunConfig
from mc2_hpc.distributed import Ranks, process_group
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import resolve
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import write_tensors
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.optim import learning_rate
from mc2_hpc.training.step import ContrastiveStep
from tests.training import fused_adam, zero_worker

CASES = [(b, s) for b, s in product(("torch", "deepspeed", "apex"), (0, 1, 2, 3)) if (b, s) != ("apex", 3)]
HALF = zero_worker.STEPS // 2


def name_of(backend: str, stage: int) -> str:
    return f"{backend}_zero{stage}"


def run_config(backend: str, stage: int) -> RunConfig:
    return zero_worker.run_config(stage, optim={"lr": 1e-3, "warmup": 5, "backend": backend})


class Run:
    """A run that is stopped half-way: a new engine continues from tensor files by parameter name."""

    def __init__(self, config: RunConfig, ranks: Ranks, folder: Path) -> None:
        self.config, self.ranks, self.folder = config, ranks, folder
        self.rows: list[list[float]] = []
        self.start(build_clip(resolve(config.model), seed=0))

    def start(self, clip: torch.nn.Module) -> None:
        self.engine = Engine(clip, self.config, self.ranks, num_micro=1)
        self.step = ContrastiveStep(self.engine, self.config.loss, feature_dtype=torch.float32)

    def train(self, steps: range) -> None:
        own = zero_worker.share(self.ranks)
        for number in steps:
            images, tokens = zero_worker.batches()[number]
            lr = learning_rate(number, total=zero_worker.STEPS, config=self.config.optim)
            result = self.step(images[own], tokens[own], lr)
            self.rows.append([float(result.loss), float(result.grad_norm), float(self.engine.logit_scale.detach())])

    def state(self) -> dict[tuple[str, str], torch.Tensor]:
        return {(kind, name): tensor.clone() for kind, name, tensor in self.engine.state()}

    def resume(self, num_steps: int) -> None:
        state = self.state()
        if self.ranks.is_first:
            moments = {f"{name}.{kind}": tensor for (kind, name), tensor in state.items() if kind != "weight"}
            write_tensors(self.folder / "optimizer.0.safetensors", moments)
        torch.distributed.barrier()
        self.engine.close()
        clip = build_clip(resolve(self.config.model), seed=1)
        clip.load_state_dict({name: tensor for (kind, name), tensor in state.items() if kind == "weight"})
        self.start(clip)
        self.engine.load_moments(TensorFiles(self.folder, "optimizer"), num_steps)
        torch.distributed.barrier()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rows = {}
    with process_group(timeout_s=120) as ranks:
        fused_adam.install()
        for backend, stage in CASES:
            run = Run(run_config(backend, stage), ranks, out)
            run.train(range(HALF))
            run.resume(HALF)
            run.train(range(HALF, zero_worker.STEPS))
            rows[name_of(backend, stage)] = run.rows
            weights = {name: tensor for (kind, name), tensor in run.state().items() if kind == "weight"}
            run.engine.close()
            if ranks.is_first:
                save_file(weights, out / f"{name_of(backend, stage)}.safetensors")
        if ranks.is_first:
            (out / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
