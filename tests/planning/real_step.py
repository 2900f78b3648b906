"""A real training step on CPU ranks, counted: what traces are compared with."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from mc2_hpc.config import RunConfig, config_from_dict
from mc2_hpc.distributed import process_group
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.lora import add_adapters, init_adapters
from mc2_hpc.models.packed_captions import caption_lengths
from mc2_hpc.models.presets import ClipArchitecture, resolve
from mc2_hpc.planning.captions import captions_of
from mc2_hpc.planning.counting import Counting
from mc2_hpc.planning.plan import planned_teacher
from mc2_hpc.planning.records import StepTrace
from mc2_hpc.planning.teacher import PlannedFeatures, PlannedTeacher, batch_of, stored_width
from mc2_hpc.planning.trace import CountedEngine, counted_step, trace_step
from mc2_hpc.training.freezing import adapters_of
from mc2_hpc.training.patch_dropout import PatchDropout
from mc2_hpc.training.step import num_micro_batches

PAIRS = 8


def tiny_config(*, world_size: int = 1, size: int = 1, pairs: int = PAIRS, **values: Any) -> RunConfig:
    """A run of tiny models; ``size`` multiplies their widths and layers."""
    model = {
        "preset": "ViT-S-16-worldwide",
        "embed_dim": 32 * size,
        "vision": {"image_size": 32, "width": 64 * size, "layers": 1 + size, "head_width": 32},
        "text": {"vocab_size": 800, "context_length": 24, "width": 48 * size, "heads": 3, "layers": 1 + size},
        **values.pop("model", {}),
    }
    return config_from_dict(
        {
            "global_batch": pairs * world_size,
            "precision": "fp32",
            "model": model,
            "data": {"lanes": world_size},
            **values,
        },
        "test",
    )


def tokens_of(config: RunConfig, rank: int) -> torch.Tensor:
    """(b, 24) token ids, with captions of very different lengths."""
    text = config.model.text
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(3, text.vocab_size, (config.global_batch // config.data.lanes, 24), generator=generator)
    tokens[torch.arange(len(tokens)), torch.randint(2, 24, (len(tokens),), generator=generator)] = 2
    tokens[0, 1:] = torch.tensor([2] * 23)
    tokens[-1] = torch.arange(3, 27)
    tokens[-1, -1] = 2
    return tokens


def traced(config: RunConfig, world_size: int) -> StepTrace:
    """The trace of rank 0's step, on CPU ranks."""
    captions = captions_of([tokens_of(config, rank) for rank in range(world_size)], eos_id=2)
    return trace_step(
        config,
        resolve(config.model),
        captions,
        world_size=world_size,
        per_node=world_size,
        device_type="cpu",
        teacher_arch=planned_teacher(config),
    )


def real_teacher(
    config: RunConfig, arch: ClipArchitecture, device: torch.device
) -> PlannedTeacher | PlannedFeatures | None:
    """As a run has it, but with weights that are drawn."""
    if config.distill is None:
        return None
    if (teacher_arch := planned_teacher(config)) is None:
        return PlannedFeatures(config, stored_width(config, arch), device)
    clip = build_clip(teacher_arch, seed=1)
    clip.set_backends(config.model, "cpu")
    return PlannedTeacher(config, arch, clip, device)


def real(config: RunConfig) -> dict[str, Any]:
    """This rank's real step: peak bytes, FlopCounterMode's flops, collectives as ``[kind, calls, bytes]``."""
    arch = resolve(config.model)
    with process_group(60) as ranks:
        tokens = tokens_of(config, ranks.rank)
        lengths = caption_lengths(tokens, 2)
        captions = captions_of([tokens], eos_id=2)
        counting = Counting(gloo=False)  # what gloo allocates is seen
        with counting:
            clip = build_clip(arch, seed=0)
            if (adapters := adapters_of(config)) is not None:
                add_adapters(clip, adapters)
                init_adapters(clip, seed=0)
            clip.set_backends(config.model, "cpu")
            engine = CountedEngine(
                clip, config, ranks, num_micro=num_micro_batches(config, ranks.world_size), counting=counting
            )
            step = counted_step(engine, config, ranks.world_size, counting)
            dropout = PatchDropout(config, arch, ranks.device)
            teacher = real_teacher(config, arch, ranks.device)
            del clip

            def run() -> None:
                images = torch.zeros(len(tokens), 3, 32, 32, dtype=torch.uint8)
                if config.data.features is not None:
                    images = torch.zeros(len(tokens), arch.embed_dim)
                kept = dropout([str(row) for row in range(len(tokens))], 0)
                inputs = None if teacher is None else teacher.inputs(captions)
                counting.begin()
                taught = None if teacher is None else teacher.features(batch_of(captions, images, inputs), images)
                del inputs
                step(images, tokens, 1e-4, lengths=lengths, kept=kept, teacher=taught)

            run()
            run()
            dist.barrier()  # gloo's threads keep what they sent until then
            gc.collect()  # what is in cycles would be freed at any time, during the measured step or after it
            between = sum(counting.allocations.by_category().values())
            collectives = sorted([c.kind, c.calls, c.bytes] for c in counting.collectives())
            peak = counting.allocations.peak
        peaks = []
        for _ in range(3):
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, profile_memory=True) as recorded:
                run()
            peaks.append(_peak_of(recorded))
        with FlopCounterMode(display=False) as flops:
            run()
        dist.barrier()
    return {
        # The profiler's clock may put a buffer's end after the next one's beginning, which only adds to the peak.
        "peak": between + min(peaks),
        "dispatched_peak": peak,
        "flops": flops.get_total_flops(),
        "collectives": collectives,
    }


def _peak_of(recorded: torch.profiler.profile) -> int:
    """Most bytes of the CPU allocator above those at the start."""
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text())
    # DeepSpeed's state is global, so each case has its own ranks.
    found = real(tiny_config(**cases))
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
