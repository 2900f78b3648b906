"""The part of a run's configuration that divides it into stages, such as most steps on few tokens and a full-token tail
(CLIPA, arXiv 2305.07017).

stages:
  - samples: 12_000_000_000
    model: {patch_dropout: 0.5}
  - samples: 500_000_000
    global_batch: 32_768
    model: {patch_dropout: 0.0}
    optim: {schedule: wsd, lr: 1e-4, decay_steps: 15_000}

A stage's keys have the meaning that they have at the top of the file, and override it there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from mc2_hpc.config_optim import OptimConfig
from mc2_hpc.errors import UserError


class _Settings(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class StagedRun(_Settings, Protocol):
    """What this module needs of a run's settings (``mc2_hpc.config.RunConfig``)."""

    @property
    def steps(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def stages(self) -> "Sequence[StageConfig]": ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def model(self) -> Any: ...
    @property
    def data(self) -> Any: ...
    @property
    def checkpoint(self) -> Any: ...


Settings = TypeVar("Settings", bound=_Settings)
Run = TypeVar("Run", bound=StagedRun)


@dataclass(frozen=True, kw_only=True)
class StageVision:
    """The image tower in a stage; ``None`` keeps the run's."""

    image_size: int | None = None
    """Another size interpolates the table of positions, as ``model.init_from`` does."""


@dataclass(frozen=True, kw_only=True)
class StageModel:
    """The model in a stage; ``None`` keeps the run's."""

    patch_dropout: float | None = None
    recompute: str | None = None
    vision: StageVision = field(default_factory=StageVision)


@dataclass(frozen=True, kw_only=True)
class StageData:
    """The data in a stage; ``None`` keeps the run's."""

    crop_scale: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class StageSchedule:
    """A learning-rate schedule of the stage's own, over its own steps. Without it, the run's continues."""

    schedule: str | None = None
    """As ``optim.schedule``; null has no schedule of its own."""
    lr: float | None = None
    """Null is the run's ``optim.lr``."""
    warmup: int = 0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        if self.schedule is None and (self.lr is not None or self.warmup or self.decay_steps):
            raise UserError(
                "stages: optim has lr, warmup or decay_steps without schedule: name the schedule that the stage has of "
                "its own, or leave out optim to continue the run's"
            )

    def applied(self, run: OptimConfig) -> OptimConfig:
        """The run's settings with this schedule."""
        if self.schedule is None:
            return run
        lr = run.lr if self.lr is None else self.lr
        return replace(run, schedule=self.schedule, lr=lr, warmup=self.warmup, decay_steps=self.decay_steps)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: its length, and what differs from the run's settings."""

    steps: int | None = None
    samples: int | None = None
    """In place of ``steps``: as many steps as these pairs need, rounded up."""
    global_batch: int | None = None
    micro_batch: int | None = None
    precision: str | None = None
    model: StageModel = field(default_factory=StageModel)
    data: StageData = field(default_factory=StageData)
    optim: StageSchedule = field(default_factory=StageSchedule)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.samples is None):
            raise UserError("stages: each stage needs either steps or samples")
        if (self.steps or self.samples or 0) < 1:
            raise UserError(
                f"stages: a stage of {self.steps or self.samples or 0} steps or samples: must be at least 1"
            )

    def num_steps(self, global_batch: int) -> int:
        """Its length in steps.

        Args:
            global_batch: the run's.
        """
        if self.steps is not None:
            return self.steps
        assert self.samples is not None
        return -(-self.samples // (self.global_batch or global_batch))


@dataclass(frozen=True, kw_only=True)
class RunStage(Generic[Run]):
    """One stage of a run, or a whole run that has none."""

    config: Run
    """The run's settings with the stage's; ``steps`` are the whole run's, and ``stages`` is empty."""
    number: int
    """Counted from 1."""
    count: int
    """Stages of the run."""
    begin: int
    """Steps of the run before it."""
    end: int
    """Steps of the run after it."""
    own_schedule: bool
    """Whether the learning rate is a function of the stage's steps instead of the run's."""

    @property
    def is_last(self) -> bool:
        """Whether the run ends with it."""
        return self.number == self.count

    @property
    def schedule(self) -> tuple[int, int]:
        """Steps of the run before its learning-rate schedule begins, and the length of that."""
        return (self.begin, self.end - self.begin) if self.own_schedule else (0, self.config.steps)


def total_steps(stages: Sequence[StageConfig], global_batch: int) -> int:
    """The length of a run of ``stages``; ``global_batch`` is the run's."""
    return sum(stage.num_steps(global_batch) for stage in stages)


def run_stages(config: Run) -> list[RunStage[Run]]:
    """The stages of a run, in order; a run without any is a single one.

    Raises:
        UserError: a stage has settings that do not go together.
    """
    if not config.stages:
        return [RunStage(config=config, number=1, count=1, begin=0, end=config.steps, own_schedule=False)]
    return list(_stages(config))


def stage_after(config: Run, step: int) -> RunStage[Run]:
    """The stage that trains the step after ``step`` steps of a run; the last one if there is no such step."""
    stages = run_stages(config)
    return next((stage for stage in stages if step < stage.end), stages[-1])


def _stages(config: Run) -> Iterator[RunStage[Run]]:
    begin = 0
    for number, stage in enumerate(config.stages, start=1):
        end = begin + stage.num_steps(config.global_batch)
        try:
            settings = _applied(config, stage)
        except UserError as error:
            raise UserError(f"stages: stage {number}: {error}") from None
        if stage.optim.decay_steps > end - begin or stage.optim.warmup > end - begin:
            raise UserError(f"stages: stage {number}: has only {end - begin} steps to warm up and decay in")
        yield RunStage(
            config=settings,
            number=number,
            count=len(config.stages),
            begin=begin,
            end=end,
            own_schedule=stage.optim.schedule is not None,
        )
        begin = end


def _applied(config: Run, stage: StageConfig) -> Run:
    model = _overridden(config.model, patch_dropout=stage.model.patch_dropout, recompute=stage.model.recompute)
    vision = _overridden(config.model.vision, image_size=stage.model.vision.image_size)
    return replace(
        _overridden(
            config, global_batch=stage.global_batch, micro_batch=stage.micro_batch, precision=stage.precision, stages=[]
        ),
        model=replace(model, vision=vision),
        data=_overridden(config.data, crop_scale=stage.data.crop_scale),
        optim=stage.optim.applied(config.optim),
    )


def _overridden(settings: Settings, **values: object) -> Settings:
    return replace(settings, **{key: value for key, value in values.items() if value is not None})


def check_stages(config: StagedRun) -> None:
    """
    Raises:
        UserError: the stages do not go together with each other or with the run's settings.
    """
    run_stages(config)
    if not config.checkpoint.resume:
        raise UserError("stages and checkpoint.resume=false: a stage continues from a checkpoint of the one before it")
    if config.data.features is not None:
        raise UserError("stages and data.features: features are of one image size and crop; set only one")
    sized = [stage.model.vision.image_size is not None for stage in config.stages]
    if any(sized) and not all(sized):
        one, other = sized.index(True) + 1, sized.index(False) + 1
        raise UserError(
            f"stages: stage {one} sets model.vision.image_size and stage {other} does not: set it in every stage"
        )
