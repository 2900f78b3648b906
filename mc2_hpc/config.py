"""The typed configuration tree of a training run: one YAML file plus ``key.sub=value`` overrides.

    config = load_config("configs/train/vit_h14_worldwide.yaml", ["optim.lr=1e-4"])

Every field has a type and a default. An unknown key or a value of the wrong type raises a :class:`UserError` that names
the file and the key. A parsed config is read-only (frozen dataclasses): mutable state lives in the trainer.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mc2_hpc.config_data import DataConfig
from mc2_hpc.config_model import ModelConfig, TextOverrides, VisionOverrides
from mc2_hpc.config_optim import FreezeConfig, LoraConfig, OptimConfig
from mc2_hpc.config_stages import StageConfig, check_stages, total_steps
from mc2_hpc.errors import UserError
from mc2_hpc.precision import Precision
from mc2_hpc.reading.checks import at_least as _at_least
from mc2_hpc.reading.checks import choose as _choose
from mc2_hpc.reading.settings import PathName, typed
from mc2_hpc.reading.yaml_file import read_yaml

__all__ = [
    "DataConfig",
    "FreezeConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TextOverrides",
    "VisionOverrides",
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "read_yaml",
    "setting",
    "typed",
    "with_settings",
    "yaml_text",
]


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """How DeepSpeed partitions the training state."""

    stage: int = 1
    """0: none (replicas); 1: optimizer state; 2: also gradients; 3: also parameters."""
    bucket_elements: int = 500_000_000
    """Elements per communication bucket."""
    reduction: str = "all_reduce"
    """Stages 1 and 2: ``all_reduce`` sums whole gradients on every rank (DeepSpeed's way), ``scatter`` only the part
    that the rank updates, while backward runs, in messages of ``bucket_elements``."""
    reduce_dtype: str = "fp32"
    """The type that gradients travel in: ``fp32``, or ``bf16`` for half the bytes. Micro-batches add up in fp32, and so
    do the ranks' parts with ``reduction: scatter``."""
    gather_dtype: str = "fp32"
    """Stages 1 and 2: the type that updated weights of linear layers are gathered in. ``bf16`` is half the bytes, and
    computes the same under ``precision: bf16``."""
    persist_below_elements: int = 100_000
    """Stage 3: parameters smaller than this stay whole on every rank."""

    def __post_init__(self) -> None:
        _choose("zero.stage", str(self.stage), ("0", "1", "2", "3"))
        _at_least("zero.persist_below_elements", self.persist_below_elements, 0)
        _at_least("zero.bucket_elements", self.bucket_elements, 1)
        _choose("zero.reduction", self.reduction, ("all_reduce", "scatter"))
        _choose("zero.reduce_dtype", self.reduce_dtype, (Precision.FP32, Precision.BF16))
        _choose("zero.gather_dtype", self.gather_dtype, (Precision.FP32, Precision.BF16))
        for name, value, default in (
            ("reduction", self.reduction, "all_reduce"),
            ("gather_dtype", self.gather_dtype, "fp32"),
        ):
            if value != default and self.stage not in (1, 2):
                raise UserError(
                    f"zero.{name}={value} and zero.stage={self.stage}: is for stages 1 and 2; "
                    f"set zero.{name}={default} or zero.stage=1"
                )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss over the global batch."""

    kind: str = "softmax"
    """``softmax`` (CLIP's, the recipe), or ``sigmoid`` (SigLIP's), which also learns the bias ``logit_bias``."""
    backend: str = "auto"
    """``triton``, ``tiled`` (PyTorch), ``reference`` (dense) or ``auto`` (table in ``mc2_hpc.kernels.contrastive``)."""
    exchange: str = "all_gather"
    """How ranks see each other's features: ``all_gather``, or ``ring`` (memory independent of the number of ranks)."""

    @property
    def has_bias(self) -> bool:
        """Whether the model has a ``logit_bias``."""
        return self.kind == "sigmoid"

    def __post_init__(self) -> None:
        _choose("loss.kind", self.kind, ("softmax", "sigmoid"))
        _choose("loss.backend", self.backend, ("auto", "triton", "tiled", "reference"))
        _choose("loss.exchange", self.exchange, ("all_gather", "ring"))


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher whose similarities of each batch the model learns besides the pairs themselves."""

    teacher: PathName = ""
    """A run or checkpoint, an open_clip folder or a transformers folder, of a model of square images. Its image size,
    tokenizer and width may differ from the student's."""
    features: PathName | None = None
    """Folder of a teacher's features that ``mc2 features --teacher`` computes; the run then loads no ``teacher``."""
    weight: float = 1.0
    """Of the divergence from the teacher, relative to the contrastive loss."""
    scale: float = 200.0
    """The teacher's logits are this times its cosines; its inverse temperature."""
    micro_batch: int = 0
    """Pairs that the teacher encodes at a time; 0 encodes a rank's whole share."""

    def __post_init__(self) -> None:
        if not self.teacher.strip() and self.features is None:
            raise UserError("distill.teacher: is not set; name a model, or leave out the section distill")
        if self.teacher.strip() and self.features is not None:
            raise UserError(
                "distill.teacher and distill.features: either computes the teacher's features; set only one"
            )
        for name in ("weight", "scale"):
            if getattr(self, name) <= 0:
                raise UserError(f"distill.{name}={getattr(self, name)}: must be positive")
        _at_least("distill.micro_batch", self.micro_batch, 0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and how many checkpoints are kept."""

    every: int = 2000
    """Steps between saves."""
    last: bool = True
    """Save the last step too; false is for measurements, whose weights nobody needs."""
    keep: int = 2
    """How many of the newest checkpoints to keep."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run folder, if there is one."""
    background: bool = True
    """Continue training while a copy of the state is written; false waits until each checkpoint is on disk."""

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 1)
        _at_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training, by all ranks between two steps."""

    suite: PathName | None = None
    """A suite file (``configs/eval/``); null evaluates nothing."""
    every: int = 20_000
    """Steps between evaluations; the last step's weights are always evaluated."""
    root: PathName | None = None
    """Where the sets are, in place of the suite's ``root``."""
    batch: int = 64
    """Images per rank and forward pass."""
    ema: bool = False
    """Evaluate the moving average of the weights (``optim.ema_decay``) in place of the weights."""
    best: str | None = None
    """``<set>/<metric>`` whose largest value so far decides which checkpoint is kept as the best; null uses the leading
    metric of the first set that could be scored."""

    def __post_init__(self) -> None:
        _at_least("eval.every", self.every, 1)
        _at_least("eval.batch", self.batch, 1)
        if self.suite is None and (self.best is not None or self.root is not None):
            raise UserError("eval.best and eval.root: need eval.suite, the sets to evaluate")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps torch.profiler records, into the folder ``profile`` of the output."""

    steps: tuple[int, int] | None = None
    """First and last step, counted from 1 (``[3, 5]`` are three steps); null profiles nothing."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""

    def __post_init__(self) -> None:
        if self.steps is not None and not 1 <= self.steps[0] <= self.steps[1]:
            raise UserError(f"profile.steps={list(self.steps)}: needs 1 <= first <= last, such as [3, 5]")
        if not self.ranks or min(self.ranks) < 0:
            raise UserError(f"profile.ranks={self.ranks}: name at least one rank, counted from 0, such as [0]")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where rows of metrics go besides the terminal, ``metrics.jsonl`` and TensorBoard."""

    wandb: bool = False
    """Also to Weights & Biases, whose own environment variables (``WANDB_PROJECT``, ``WANDB_MODE``, ...) apply."""
    planned_peak: bool = True
    """On GPUs, log once how much memory ``mc2 plan`` predicts beside what was measured. A process of lower
    priority computes it while the run starts, in about half a minute on one core."""


_RECIPE_STEPS = 391_136


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    output: PathName = "runs/default"
    """Folder for logs and checkpoints."""
    steps: int = _RECIPE_STEPS
    """Length of the run; with ``stages``, the sum of theirs."""
    stages: list[StageConfig] = field(default_factory=list)
    """Parts of the run with settings of their own (``mc2_hpc.config_stages``), trained one after another."""
    global_batch: int = 75_264
    """Pairs per step, over all ranks: the contrastive loss sees all of them at once."""
    micro_batch: int = 0
    """Pairs that a rank encodes at a time; 0 encodes its whole share. Smaller values recompute features (GradCache):
    the same loss and gradients in less memory."""
    precision: str = "bf16"
    """``fp32``, ``bf16`` (autocast over fp32 parameters), or ``fp8`` (bf16 with the large products of the blocks in
    fp8, by torchao; on GPUs of compute capability 8.9 or newer)."""
    fp8_min_size: int = 1024
    """With ``precision: fp8``: the smallest width at either end of the linear layers that compute in fp8. For small
    products, converting the operands costs more than it saves."""
    seed: int = 0
    """Seeds the initial weights."""
    log_every: int = 10
    """Steps between rows of metrics."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    lora: LoraConfig | None = None
    """Null trains the weights themselves."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig | None = None
    """Null trains without a teacher."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not self.output.strip():
            raise UserError("output: is empty; name a folder")
        _choose("precision", self.precision, tuple(Precision))
        for name in ("steps", "global_batch", "log_every", "fp8_min_size"):
            _at_least(name, getattr(self, name), 1)
        if self.stages:
            total = total_steps(self.stages, self.global_batch)
            if self.steps not in (_RECIPE_STEPS, total):
                raise UserError(f"steps={self.steps}: the stages have {total}; leave out steps")
            object.__setattr__(self, "steps", total)  # frozen once it is made
        _at_least("micro_batch", self.micro_batch, 0)
        if self.profile.steps is not None and self.profile.steps[1] > self.steps:
            raise UserError(f"profile.steps={list(self.profile.steps)}: the run has only {self.steps} steps")
        self._check_lora()
        if self.data.features is not None and self.freeze.vision != "all":
            raise UserError("data.features: features of images cannot change; set freeze.vision=all")
        if self.data.features is not None and self.distill is not None and self.distill.features is None:
            raise UserError(
                "data.features and distill.teacher: a teacher needs the images; set distill.features, or only one"
            )
        if self.distill is not None and self.distill.features is not None:
            if any(stage.data.crop_scale is not None for stage in self.stages):
                raise UserError("stages: data.crop_scale and distill.features: its features are of one; set it for all")
        if self.distill is not None and self.loss.kind != "softmax":
            raise UserError(f"loss.kind={self.loss.kind} and distill: a teacher is compared by softmax; set only one")
        if self.model.patch_dropout and self.freeze.vision == "all":
            raise UserError("model.patch_dropout and freeze.vision=all: no part of the image tower is trained; set one")
        if self.eval.ema and not self.optim.ema_decay:
            raise UserError("eval.ema=true: there is no moving average; set optim.ema_decay")
        if self.model.attention == "xformers" and self.precision == Precision.FP32:
            raise UserError(
                "model.attention=xformers and precision=fp32: its kernels compute in half types only; "
                "set precision=bf16 or model.attention=auto"
            )
        if self.model.compile and self.zero.stage == 3:
            raise UserError(
                "model.compile=true and zero.stage=3: DeepSpeed fetches parameters around every layer, which breaks "
                "the compiled graph there; set model.compile=false, or zero.stage to 0, 1 or 2"
            )
        if self.precision == Precision.FP8 and self.zero.stage == 3:
            raise UserError(
                "precision=fp8 and zero.stage=3: products in fp8 would keep the whole weights that stage 3 divides; "
                "set zero.stage to 0, 1 or 2"
            )
        if self.optim.matrices == "muon" and self.zero.stage == 3:
            raise UserError(
                "optim.matrices=muon and zero.stage=3: Muon needs whole matrices, and stage 3 divides every one; "
                "set zero.stage to 0, 1 or 2"
            )
        if self.zero.gather_dtype == "bf16" and self.precision != "bf16":
            raise UserError(
                f"zero.gather_dtype=bf16 and precision={self.precision}: not every product rounds these "
                f"weights to bf16; set precision=bf16 or zero.gather_dtype=fp32"
            )
        if self.optim.matrices == "muon" and self.lora is not None:
            raise UserError("optim.matrices=muon and lora: Muon is for the matrices themselves; set only one")
        if self.optim.backend == "apex" and self.zero.stage == 3:
            raise UserError(
                "optim.backend=apex and zero.stage=3: apex counts the steps of a group of parameters, which stage 3 "
                "updates in pieces; set optim.backend=deepspeed or torch"
            )
        if self.optim.decay_steps > self.steps:
            raise UserError(f"optim.decay_steps={self.optim.decay_steps}: the run has only {self.steps} steps")
        if self.global_batch % self.data.lanes:
            raise UserError(
                f"global_batch={self.global_batch} is not a multiple of data.lanes={self.data.lanes}: "
                f"choose a number of lanes that divides it"
            )
        if self.stages:
            check_stages(self)

    def _check_lora(self) -> None:
        if self.lora is None:
            return
        for tower in ("vision", "text"):
            if getattr(self.lora, tower) and getattr(self.freeze, tower) is not None:
                raise UserError(
                    f"lora.{tower}=true and freeze.{tower}={getattr(self.freeze, tower)}: an adapted tower is frozen "
                    f"except for its adapters; set lora.{tower}=false or freeze.{tower}=null"
                )
        if self.lora.text and self.model.new_tokenizer:
            raise UserError(
                "lora.text=true and model.new_tokenizer=true: the token table would stay that of another tokenizer; "
                "set lora.text=false"
            )


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML file and apply ``key.sub=value`` overrides.

    Raises:
        UserError: no such file, not YAML, an unknown key (the message suggests the nearest one), or a value of the
            wrong type or out of range.
    """
    return typed(RunConfig, read_yaml(path, "config file"), overrides or (), source=str(path))


def config_from_dict(values: dict[str, Any], source: str = "config") -> RunConfig:
    """Build a config from plain values, such as those in a checkpoint's ``trainer.json``; errors name ``source``."""
    return typed(RunConfig, values, source=source)


def with_settings(config: RunConfig, settings: Mapping[str, Any], source: str = "config") -> RunConfig:
    """The config with other values of some settings, by ``key.sub``.

    Raises:
        UserError: a value that is out of range, or that does not go with the others; names ``source``.
    """
    values = config_to_dict(config)
    for key, value in settings.items():
        *sections, name = key.split(".")
        section = values
        for each in sections:
            section = section[each]
        section[name] = value
    return config_from_dict(values, source)


def setting(config: RunConfig, key: str) -> Any:
    """The value of ``key.sub``."""
    return functools.reduce(getattr, key.split("."), config)


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain, JSON-ready values of the whole tree; :func:`config_from_dict` turns them back into an equal config."""
    return dataclasses.asdict(config)


def yaml_text(values: dict[str, Any]) -> str:
    """Plain values as YAML that :func:`read_yaml` reads back unchanged: ``${`` in strings is written as ``$${``."""
    return yaml.safe_dump(_escaped(values), allow_unicode=True, sort_keys=False)


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(part) for part in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
