"""Trains a few steps with a teacher at every ZeRO stage; writes each step's numbers and the final weights.

python -m torch.distributed.run --standalone --nproc-per-node 2 distill_worker.py OUT TEACHER [CASE ...]
"""

import json
import sys
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file

from mc2_hpc.config import RunConfig
from mc2_hpc.data.batches import Batch
from mc2_hpc.data.teacher import TeacherInputs
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.distributed import Ranks, process_group
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.packed_captions import caption_lengths
from mc2_hpc.models.presets import resolve
from mc2_hpc.models.weights import TOKENIZER_FILE
from mc2_hpc.precision import Precision
from mc2_hpc.training.distillation import DistillationTeacher
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.optim import learning_rate
from mc2_hpc.training.step import ContrastiveStep
from tests.training import zero_worker

STEPS = 5
TEACHER_SIZE, TEACHER_CONTEXT, TEACHER_VOCABULARY = 48, 10, 90

# (name, ZeRO stage, backward passes per step, precision, loss.exchange)
CASES = [
    ("zero0", 0, 1, "fp32", "all_gather"),
    ("zero1_gradcache", 1, 2, "fp32", "ring"),
    ("zero2_gradcache", 2, 2, "fp32", "all_gather"),
    ("zero3", 3, 1, "fp32", "ring"),
    ("zero3_gradcache", 3, 2, "fp32", "all_gather"),
    ("zero1_bf16", 1, 1, "bf16", "all_gather"),
]


def run_config(teacher: str, stage: int = 0, precision: str = "fp32", exchange: str = "all_gather") -> RunConfig:
    distill = {"teacher": teacher, "weight": 0.8, "scale": 50.0, "micro_batch": 3}
    return zero_worker.run_config(stage, precision, distill=distill, loss={"backend": "tiled", "exchange": exchange})


def batches() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The same random global batches on every rank: images and tokens of the student, and those of the teacher."""
    generator = torch.Generator().manual_seed(1)
    size, result = (zero_worker.BATCH, 3, TEACHER_SIZE, TEACHER_SIZE), []
    for images, tokens in islice(zero_worker.batches(), STEPS):
        teacher_images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        teacher_tokens = torch.randint(3, TEACHER_VOCABULARY, (zero_worker.BATCH, TEACHER_CONTEXT), generator=generator)
        teacher_tokens[:, -1] = 2
        result.append((images, tokens, teacher_images, teacher_tokens))
    return result


def train(config: RunConfig, ranks: Ranks, *, num_micro: int) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """(loss, divergence, gradient norm, logit scale) of every step, and the final weights by name."""
    assert config.distill is not None
    arch = resolve(config.model)
    engine = Engine(build_clip(arch, seed=0), config, ranks, num_micro=num_micro)
    # The teacher's tokenizer, cut at another length, is another one.
    tokenizer = Tokenizer(Path(config.distill.teacher) / TOKENIZER_FILE, "xlmv", arch.text.context_length)
    teacher = DistillationTeacher(config, arch, tokenizer, ranks)
    assert teacher.needs.image_size == TEACHER_SIZE and teacher.needs.captions is not None
    step = ContrastiveStep(engine, config.loss, feature_dtype=Precision(config.precision).dtype)
    rows = []
    own = zero_worker.share(ranks)
    for number, tensors in enumerate(batches()):
        images, tokens, teacher_images, teacher_tokens = (tensor[own] for tensor in tensors)
        lengths = caption_lengths(tokens, 2)
        inputs = TeacherInputs(pixels=teacher_images, tokens=teacher_tokens[:, None], pads=(1,))
        names = {key: [""] * len(images) for key in ("keys", "langs", "sources")}
        batch = Batch(images=images, tokens=tokens, lengths=lengths, **names, position={}, teacher=inputs)
        lr = learning_rate(number, total=zero_worker.STEPS, config=config.optim)
        result = step(images, tokens, lr, lengths=lengths, teacher=teacher.features(batch, images))
        numbers = (result.loss, result.divergence, result.grad_norm, engine.logit_scale)
        rows.append([float(number) for number in numbers])
    state = {(kind, name): tensor.clone() for kind, name, tensor in engine.state()}
    assert {name for _, name in state} == {name for name, _ in build_clip(arch, seed=0).named_parameters()}
    engine.close()
    return rows, {name: tensor for (kind, name), tensor in state.items() if kind == "weight"}


def main(out: Path, teacher: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    rows = {}
    with process_group(timeout_s=120) as ranks:
        for name, stage, num_micro, precision, exchange in CASES:
            if name in names:
                config = run_config(teacher, stage, precision, exchange)
                rows[name], weights = train(config, ranks, num_micro=num_micro)
                if ranks.is_first:
                    save_file(weights, out / f"{name}.safetensors")
        if ranks.is_first:
            (out / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
