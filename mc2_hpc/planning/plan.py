"""A plan of a run: what a step needs and, for a GPU and a network, how long a run is predicted to take and to cost."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mc2_hpc.config import RunConfig
from mc2_hpc.config_stages import RunStage, run_stages
from mc2_hpc.data.lanes import rank_batches
from mc2_hpc.errors import UserError
from mc2_hpc.models.presets import PRESETS, ClipArchitecture, resolve
from mc2_hpc.planning.captions import MEAN_TOKENS, draw_captions
from mc2_hpc.planning.machines import Gpu, Network
from mc2_hpc.planning.predict import StepTime, predict_step
from mc2_hpc.planning.processes import answers
from mc2_hpc.planning.records import StepTrace
from mc2_hpc.planning.scaling import Point, scaling
from mc2_hpc.precision import Precision

RESERVE_BYTES = 2 << 30
"""Memory of a GPU that a plan leaves to the CUDA context, NCCL and the allocator's fragments: an assumption. Between
peak memory and peak reserved memory lie 2 to 8 GiB in docs/step.md."""
IMAGES_PER_CORE = 300.0
"""Decoded images per second and CPU core that a plan assumes; ``mc2 bench decode`` measures it."""
IMAGE_BYTES = 30_000
"""Bytes of a stored pair that a plan assumes; ``--pair-bytes`` sets it."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan cannot know from the config."""

    caption_tokens: float = MEAN_TOKENS
    pair_bytes: float = IMAGE_BYTES
    images_per_core: float = IMAGES_PER_CORE
    storage_bytes_per_second: float = 5e9
    """To which checkpoints are written, all ranks together."""
    host_bytes_per_second: float = 20e9
    """Of a copy from a GPU to pinned host memory: most of PCIe 4.0 x16."""
    gpu_failures_per_year: float = 0.17
    """Interruptions of a run per GPU and year: those of Llama 3, 419 unexpected ones in 54 days on 16,384 GPUs
    (arXiv 2407.21783, section 3.3.4)."""
    restart_seconds: float = 600
    price: float | None = None
    """Of a GPU hour."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a config on ``gpus`` GPUs. Times and costs are predictions."""

    config: RunConfig
    trace: StepTrace
    gpu_name: str
    gpu: Gpu
    network_name: str
    network: Network
    per_node: int
    step: StepTime
    assumptions: Assumptions
    smaller: StepTrace | None = None
    """The step of half as many pairs per GPU."""
    stage: RunStage[RunConfig] | None = None
    """The part of a run that is planned; ``None`` is all of it."""

    @property
    def gpus(self) -> int:
        return self.trace.world_size

    @property
    def steps(self) -> int:
        return self.config.steps if self.stage is None else self.stage.end - self.stage.begin

    @property
    def shard_bytes(self) -> float:
        """Read in all."""
        return self.steps * self.config.global_batch * self.assumptions.pair_bytes

    @property
    def pairs_per_second(self) -> float:
        return self.config.global_batch / self.step.seconds

    @property
    def days(self) -> float:
        """Of steps alone, without stalls and failures."""
        return self.steps * self.step.seconds / 86_400

    @property
    def gpu_hours(self) -> float:
        """With stalls and failures."""
        return self.days / self.goodput * 24 * self.gpus

    @property
    def money(self) -> float | None:
        """Of the GPU hours; ``None`` without a price."""
        return None if self.assumptions.price is None else self.assumptions.price * self.gpu_hours

    @property
    def mfu(self) -> float:
        """Of the model's own flops."""
        return self.trace.model_flops / self.step.seconds / self.gpu.flops

    @property
    def fits(self) -> bool:
        return self.trace.peak.bytes + RESERVE_BYTES <= self.gpu.memory_bytes

    @property
    def checkpoint_stall(self) -> float:
        """Seconds that training waits for a save: the copy to host memory by up to 32 ranks (docs/training.md)."""
        copied = self.trace.checkpoint_bytes / min(self.gpus, 32) / self.assumptions.host_bytes_per_second
        if self.config.checkpoint.background:
            return copied
        return copied + self.trace.checkpoint_bytes / self.assumptions.storage_bytes_per_second

    @property
    def goodput(self) -> float:
        """Share of the time spent on steps that last: the rest goes to stalls, restarts, and steps trained again, half
        the interval between two saves for each failure."""
        between = self.config.checkpoint.every * self.step.seconds
        lost = self.assumptions.restart_seconds + between / 2
        failures = self.assumptions.gpu_failures_per_year * self.gpus / (365 * 86_400)
        return 1 / (1 + self.checkpoint_stall / between + failures * lost)

    @property
    def pairs_that_fit(self) -> int | None:
        """Pairs per GPU that its memory would hold: memory as a line through this trace and :attr:`smaller`."""
        if self.smaller is None or self.smaller.pairs == self.trace.pairs:
            return None
        per_pair = (self.trace.peak.bytes - self.smaller.peak.bytes) / (self.trace.pairs - self.smaller.pairs)
        room = self.gpu.memory_bytes - RESERVE_BYTES - self.trace.peak.bytes
        return max(0, int(self.trace.pairs + room / per_pair)) if per_pair > 0 else None

    @property
    def cure(self) -> str:
        """What would make the step fit, as far as :attr:`smaller` tells; empty if it fits."""
        if self.fits:
            return ""
        fit, pairs = self.pairs_that_fit or 0, self.trace.pairs
        full = "" if self.config.model.recompute == "full" else "model.recompute=full, "
        if fit == 0:
            return f"not even one pair per GPU does: set {full}a higher zero.stage, or plan for a larger --gpu"
        micro_batch = max(1, (self.config.micro_batch or pairs) * fit // pairs)
        gpus = -(-self.config.global_batch // fit)
        return f"about {fit:,} of {pairs:,} pairs per GPU do: set {full}micro_batch={micro_batch}, or use {gpus:,} GPUs"

    def scaling(self, *, strong: bool) -> Iterator[Point]:
        """The step at 1 to 4,096 GPUs; needs a trace of several GPUs, as one alone does not say what it would send."""
        return scaling(self.trace, self.config, self.gpu, self.network, per_node=self.per_node, strong=strong)

    def to_json(self) -> dict[str, Any]:
        """Everything but the config, for ``--json``."""
        return {
            "gpus": self.gpus,
            "gpu": {"name": self.gpu_name, **dataclasses.asdict(self.gpu)},
            "network": {"name": self.network_name, **dataclasses.asdict(self.network)},
            "per_node": self.per_node,
            "stage": None if self.stage is None else self.stage.number,
            "steps": self.steps,
            "assumptions": dataclasses.asdict(self.assumptions),
            "counted": {
                **dataclasses.asdict(self.trace),
                "executed_flops": self.trace.executed_flops,
                "peak_bytes": self.trace.peak.bytes,
            },
            "predicted": {
                **dataclasses.asdict(self.step),
                "step_seconds": self.step.seconds,
                "pairs_per_second": self.pairs_per_second,
                "mfu": self.mfu,
                "days": self.days,
                "gpu_hours": self.gpu_hours,
                "money": self.money,
                "goodput": self.goodput,
                "checkpoint_stall_seconds": self.checkpoint_stall,
                "fits": self.fits,
                "pairs_that_fit": self.pairs_that_fit,
            },
            "scaling": {
                name: [dataclasses.asdict(point) for point in self.scaling(strong=name == "strong")]
                for name in (("weak", "strong") if self.gpus > 1 else ())
            },
            "checkpoint_bytes": self.trace.checkpoint_bytes,
            "shard_bytes": self.shard_bytes,
            "data_bytes_per_second": self.pairs_per_second * self.assumptions.pair_bytes,
            "decode_cores": self.pairs_per_second / self.assumptions.images_per_core,
        }


@dataclass(frozen=True, kw_only=True)
class Total:
    """What all stages of a run are predicted to take, with stalls and failures."""

    days: float
    gpu_hours: float
    money: float | None
    """``None`` without a price."""

    @classmethod
    def of(cls, stages: Sequence[Plan]) -> "Total":
        money = [plan.money for plan in stages if plan.money is not None]
        return cls(
            days=sum(plan.days / plan.goodput for plan in stages),
            gpu_hours=sum(plan.gpu_hours for plan in stages),
            money=sum(money) if money else None,
        )


def plan_stages(config: RunConfig, **machine: Any) -> list[Plan]:
    """The plans of a run's stages, in order. Other arguments and errors are those of :func:`make_plans`."""
    stages = run_stages(config)
    plans, _ = make_plans([stage.config for stage in stages], **machine)
    return [dataclasses.replace(plan, stage=stage) for plan, stage in zip(plans, stages, strict=True)]


def make_plans(
    configs: Sequence[RunConfig],
    others: Sequence[RunConfig] = (),
    *,
    gpus: int,
    per_node: int,
    gpu_name: str,
    gpu: Gpu,
    network_name: str,
    network: Network,
    assumptions: Assumptions,
) -> tuple[list[Plan], list[Plan | Exception]]:
    """Plans of several configs on the same machines, traced at the same time.

    Args:
        others: planned too, without :attr:`Plan.smaller`.

    Returns:
        The plans of ``configs``, and for each of ``others`` its plan or why there is none.

    Raises:
        UserError: a batch does not fit that number of GPUs, a setting is not planned, or only the model that a run
            starts from says its sizes.
        TraceError: a trace failed.
    """
    for config in configs:
        check_planned(config)
    traced = [*configs, *(_with_half(config, gpus) for config in configs), *others]
    common = {
        "ranks": gpus,
        "per_node": per_node,
        "caption_tokens": assumptions.caption_tokens,
        "device_type": gpu.device,
    }
    calls = [{"config": each, **common} for each in traced]
    found: dict[int, StepTrace | Exception] = {}
    for place, answer in answers(trace_drawn, calls):
        if isinstance(answer, Exception) and place < 2 * len(configs):
            raise answer
        found[place] = answer

    def plan(config: RunConfig, trace: StepTrace, smaller: StepTrace | None) -> Plan:
        return Plan(
            config=config,
            trace=trace,
            gpu_name=gpu_name,
            gpu=gpu,
            network_name=network_name,
            network=network,
            per_node=per_node,
            step=predict_step(trace, config, gpu, network, per_node=per_node),
            assumptions=assumptions,
            smaller=smaller,
        )

    plans, outcomes = list[Plan](), list[Plan | Exception]()
    for place, config in enumerate(configs):
        trace, smaller = found[place], found[len(configs) + place]
        assert isinstance(trace, StepTrace) and isinstance(smaller, StepTrace)
        plans.append(plan(config, trace, smaller))
    for place, config in enumerate(others, 2 * len(configs)):
        answer = found[place]
        outcomes.append(answer if isinstance(answer, Exception) else plan(config, answer, None))
    return plans, outcomes


def _with_half(config: RunConfig, gpus: int) -> RunConfig:
    """The config with half as many pairs per GPU and micro-batch."""
    pairs = max(1, max(rank_batches(config.global_batch, lanes=config.data.lanes, num_ranks=gpus)) // 2)
    data = dataclasses.replace(config.data, lanes=gpus)
    distill = config.distill
    if distill is not None:
        distill = dataclasses.replace(distill, micro_batch=-(-distill.micro_batch // 2))
    micro_batch = -(-config.micro_batch // 2)
    return dataclasses.replace(config, global_batch=pairs * gpus, micro_batch=micro_batch, data=data, distill=distill)


def check_planned(config: RunConfig) -> None:
    """
    Raises:
        UserError: the config has a setting whose cost no trace knows, a teacher of unknown sizes, or several stages.
    """
    if config.stages:
        raise UserError("stages: each has a step of its own; plan one with stages=[] and its settings")
    if config.precision == Precision.FP8:
        raise UserError("precision: a plan does not know what products in fp8 keep; plan them in bf16: precision=bf16")
    planned_teacher(config)


def planned_architecture(config: RunConfig) -> ClipArchitecture:
    """
    Raises:
        UserError: only the model that the run starts from says its sizes.
    """
    if config.model.preset is None and config.model.init_from is not None:
        raise UserError("the plan does not read model.init_from: name its sizes with model.preset=...")
    return resolve(config.model, logit_bias=config.loss.has_bias)


def planned_teacher(config: RunConfig) -> ClipArchitecture | None:
    """The sizes of the teacher that the run runs: of our model at ``distill.teacher``, or of the preset named there.

    Raises:
        UserError: it is neither.
    """
    if config.distill is None or config.distill.features is not None:
        return None
    from mc2_hpc.models.weights import is_checkpoint, read_card, resolve_checkpoint

    name = config.distill.teacher
    if is_checkpoint(name):
        return read_card(resolve_checkpoint(name)).arch
    if name in PRESETS:
        return PRESETS[name]
    raise UserError(
        f"distill.teacher={name}: no run or checkpoint is there, and a plan reads the sizes of no other model; "
        f"to plan, name a preset in its place, such as distill.teacher=ViT-H-14-worldwide"
    )


def trace_drawn(config: RunConfig, ranks: int, per_node: int, caption_tokens: float, device_type: str) -> StepTrace:
    """Trace a step of rank 0 with drawn captions; in a process of its own.

    Args:
        device_type: ``cuda`` or ``cpu``.

    Raises:
        UserError: as :func:`make_plans`.
    """
    from mc2_hpc.planning.trace import trace_step

    check_planned(config)
    arch = planned_architecture(config)
    batches = rank_batches(config.global_batch, lanes=config.data.lanes, num_ranks=ranks)
    captions = draw_captions(
        batches,
        mean=caption_tokens,
        vocab_size=arch.text.vocab_size,
        context_length=arch.text.context_length,
        eos_id=arch.text.eos_id,
    )
    return trace_step(
        config,
        arch,
        captions,
        world_size=ranks,
        per_node=per_node,
        device_type=device_type,
        teacher_arch=planned_teacher(config),
    )
