"""The training loop: data, steps, metrics, checkpoints, and a clean stop on signals and non-finite numbers."""

import gc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mc2_hpc.config import RunConfig, config_to_dict
from mc2_hpc.config_stages import run_stages, stage_after
from mc2_hpc.data.batches import Batch
from mc2_hpc.data.enough import check_enough
from mc2_hpc.data.lanes import rank_batches
from mc2_hpc.data.loader import TrainLoader
from mc2_hpc.data.pools import epochs_in
from mc2_hpc.distributed import Ranks, on_first_rank
from mc2_hpc.models.average import AVERAGE, has_average
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.models.float8 import check_float8
from mc2_hpc.models.lora import add_adapters, init_adapters
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import ModelCard
from mc2_hpc.precision import Precision
from mc2_hpc.training.checkpoint import Checkpoint, load_weights, newest_checkpoint
from mc2_hpc.training.distillation import DistillationTeacher, StoredTeacher
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.evaluating import Interrupted, PeriodicEvaluation
from mc2_hpc.training.freezing import adapters_of, check_frozen
from mc2_hpc.training.host_copy import HostCopy
from mc2_hpc.training.image_features import check_features
from mc2_hpc.training.initial import Source, architecture, initial_source, load_initial_weights, tokenizer
from mc2_hpc.training.lost_rank import naming_the_wait
from mc2_hpc.training.metrics import Means, MetricsLog
from mc2_hpc.training.optim import stage_learning_rate
from mc2_hpc.training.patch_dropout import PatchDropout
from mc2_hpc.training.profiling import StepProfiler
from mc2_hpc.training.progress import common_shards, restore_progress, saved_progress, warn_of_other_shards
from mc2_hpc.training.resume import check_resume, report_changes, teacher_changes
from mc2_hpc.training.save_policy import Agreed, SavePolicy, agreed
from mc2_hpc.training.saving import CheckpointWriter
from mc2_hpc.training.step import ContrastiveStep, check_loss, num_micro_batches
from mc2_hpc.training.stop import Stopped, StopRequest
from mc2_hpc.training.takedown import TakedownWatch
from mc2_hpc.training.throughput import ThroughputMeter, gather, rates
from mc2_hpc.training.votes import VoteCounts, Votes

logger = logging.getLogger(__name__)

AfterRow = Callable[[Mapping[str, Any]], None]

_PACKAGES = ("mc2_hpc", "torch", "deepspeed", "numpy", "sentencepiece", "simplejpeg")


class NonFiniteError(RuntimeError):
    """The loss, the gradient norm, ``logit_scale`` or ``logit_bias`` is NaN or infinite; the last checkpoint is
    untouched."""


class SaveError(RuntimeError):
    """The run's last save failed; the checkpoint before it is untouched."""


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers are on their way from the device."""

    step: int
    lr: float
    numbers: HostCopy
    """Of :meth:`StepResult.numbers`."""
    keys: Sequence[str]


def train_run(
    config: RunConfig, ranks: Ranks, stop: StopRequest | None = None, after_row: AfterRow | None = None
) -> None:
    """Train a run through all its stages. Collective.

    Every stage resumes from the checkpoint that the one before it ends with, exactly as a new start would.

    Args:
        stop, after_row: as for :class:`Trainer`.

    Raises:
        UserError: config, data, tokenizer and checkpoint do not fit together.
        NonFiniteError, Stopped, SaveError, LostRankError: as for :meth:`Trainer.train`.
    """
    while True:
        trainer = Trainer(config, ranks, stop, after_row)
        trainer.train()
        if trainer.stage.is_last:
            return
        trainer.engine.close()
        del trainer
        gc.collect()  # DeepSpeed's hooks and the model refer to each other
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()


class Trainer:
    """One training run or, if it has stages, the one that is due, on this process's rank."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        stop: StopRequest | None = None,
        after_row: AfterRow | None = None,
    ) -> None:
        """Build model, engine and loader, and load the newest checkpoint if the config says to resume. Collective.

        Args:
            stop: checked in every step for a request to save and stop; ``None``: there will be none.
            after_row: called with every row of metrics once it is written, on the first rank.

        Raises:
            UserError: config, data, tokenizer and checkpoint do not fit together.
        """
        self.run_config = config
        """The whole run's settings."""
        self.ranks = ranks
        self.output = Path(config.output)
        self.stop = stop or StopRequest()
        self._after_row = after_row
        check_loss(config.loss, ranks.device)
        if any(stage.config.precision == Precision.FP8 for stage in run_stages(config)):
            check_float8(ranks.device)
        self._profiler = StepProfiler(config, ranks)
        folder = self.output / "checkpoints"
        checkpoint = newest_checkpoint(folder, ranks) if config.checkpoint.resume else None
        self.stage = stage_after(config, checkpoint.step if checkpoint is not None else 0)
        self.config = self.stage.config
        """The stage's settings."""
        with initial_source(self.config, checkpoint, ranks) as source:
            self._build(checkpoint, source)

    def _build(self, checkpoint: Checkpoint | None, source: Source | None) -> None:
        config, ranks, folder = self.config, self.ranks, self.output / "checkpoints"
        arch = architecture(config, source)
        check_frozen(arch, config)
        self.tokenizer = tokenizer(config, source, arch, ranks)
        self.card = ModelCard(arch=arch, tokenizer_style=self.tokenizer.style, lora=adapters_of(config))
        if checkpoint is not None:
            changes = check_resume(checkpoint, self.run_config, self.card, self.tokenizer)
            if ranks.is_first:
                report_changes(checkpoint, changes, self.run_config)
        self.writer = CheckpointWriter(
            folder, ranks, keep=config.checkpoint.keep, newest=checkpoint.step if checkpoint else -1
        )
        self.evaluation: PeriodicEvaluation | None = None
        if config.eval.suite is not None:
            self.evaluation = PeriodicEvaluation(config, self.card, self.tokenizer, ranks, self.stop)
            if checkpoint is not None:
                self.evaluation.restore_best(folder)
        num_micro = num_micro_batches(config, ranks.world_size)
        self.progress, position = restore_progress(checkpoint, is_first=ranks.is_first)
        self.takedown = TakedownWatch(config.data, ranks, self.output, step=self.progress.step)
        self.takedown.record(step=self.progress.step, progress=saved_progress(checkpoint))
        self.teacher = self._load_teacher(checkpoint)
        self.loader = TrainLoader(
            config.data,
            global_batch=config.global_batch,
            image_size=arch.vision.image_size,
            tokenizer=self.tokenizer,
            rank=ranks.rank,
            world_size=ranks.world_size,
            position=position,
            takedown=self.takedown.takedown,
            teacher=self.teacher.needs if self.teacher is not None else None,
        )
        self.shards = common_shards(self.loader.sources)
        on_first_rank(ranks, self._check_enough_data)
        if checkpoint is not None and ranks.is_first:
            warn_of_other_shards(checkpoint, self.loader.sources)
        clip = build_clip(arch, seed=config.seed)
        self._prepare_model(clip, checkpoint, source)
        check_features(clip, config, ranks)
        self.engine = Engine(clip, config, ranks, num_micro=num_micro)
        if checkpoint is not None:
            self._load_moments(checkpoint)
        self._step = ContrastiveStep(
            self.engine,
            config.loss,
            feature_dtype=Precision(config.precision).dtype,
            batches=rank_batches(config.global_batch, lanes=config.data.lanes, num_ranks=ranks.world_size),
            votes=self._votes,
        )
        self._patch_dropout = PatchDropout(config, arch, ranks.device)
        # What a step's numbers have besides loss, norm and scale.
        self._extra = [*(["divergence"] if self.teacher else []), *(["logit_bias"] if config.loss.has_bias else [])]
        self._means = Means()
        self._save_policy = SavePolicy(
            every=config.checkpoint.every,
            last_step=self.stage.end,
            background=config.checkpoint.background,
            save_last=config.checkpoint.last or not self.stage.is_last,  # the next stage starts from it
            is_final=self.stage.is_last,
        )

    def _load_teacher(self, checkpoint: Checkpoint | None) -> DistillationTeacher | StoredTeacher | None:
        if self.config.distill is None:
            return None
        teacher: DistillationTeacher | StoredTeacher
        if self.config.distill.features is None:
            teacher = DistillationTeacher(self.config, self.card.arch, self.tokenizer, self.ranks)
        else:
            teacher = StoredTeacher(self.config, self.ranks)
        if checkpoint is not None and self.ranks.is_first:
            report_changes(checkpoint, teacher_changes(checkpoint, teacher.identity))
        return teacher

    def _votes(self) -> Votes:
        return Votes(
            stop=self.stop.requested is not None,
            written=self.writer.own_part_done,
            listed=self.takedown.has_grown,
        )

    def _check_enough_data(self) -> None:
        config = self.config
        weights = sum(source.weight for source in self.loader.sources)
        for source in self.loader.sources:
            check_enough(
                source.shards,
                name=source.label,
                global_batch=config.global_batch,
                lanes=config.data.lanes,
                num_readers=min(self.ranks.world_size * max(1, config.data.workers), config.data.lanes),
                share=source.weight / weights,
            )

    def _prepare_model(self, clip: CLIP, checkpoint: Checkpoint | None, source: Source | None) -> None:
        if checkpoint is None and source is not None:
            load_initial_weights(clip, source)
        if self.card.lora is not None:
            add_adapters(clip, self.card.lora)
            init_adapters(clip, seed=self.config.seed)
        if checkpoint is not None:
            load_weights(clip, checkpoint.folder)
            logger.info("resuming %s after step %d", checkpoint.folder, checkpoint.step)
        clip.set_backends(self.config.model, self.ranks.device.type)

    def _load_moments(self, checkpoint: Checkpoint) -> None:
        averages = TensorFiles(checkpoint.folder, AVERAGE) if has_average(checkpoint.folder) else None
        self.engine.load_moments(TensorFiles(checkpoint.folder, "optimizer"), checkpoint.step, averages)

    def train(self) -> None:
        """Train to the end of the stage, saving and evaluating on the way and at the end. Collective.

        Raises:
            NonFiniteError: the loss, gradient norm or ``logit_scale`` is NaN or infinite; names the step, its keys and
                the last good checkpoint.
            Stopped: a signal asked for it, and the state is saved.
            SaveError: the last save failed. (After an earlier failure, training continues to the next save.)
            LostRankError: another rank is lost; names the step that waited for it.
        """
        done = self.progress.step >= self.stage.end
        if done and self.evaluation is None:
            logger.info("nothing to do: %s already has %d steps", self.output, self.config.steps)
            return
        log = self._open_log() if self.ranks.is_first else None
        self.stop.defer()
        try:
            # May still be due from the last start, if that ended early.
            self._evaluate(log)
            if done:
                logger.info("nothing to train: %s already has %d steps", self.output, self.config.steps)
            else:
                meter = ThroughputMeter(self.config, self.card.arch, self.ranks.device)
                with naming_the_wait(self.ranks.rank, lambda: f"in step {self.progress.step + 1}"):
                    self._loop(meter, log)
        finally:
            self._profiler.close()
            self.loader.close()
            self.takedown.close()
            self.writer.close()
            if log is not None:
                log.close()

    def _open_log(self) -> MetricsLog:
        config = self.config
        wandb_config = config_to_dict(self.run_config) if config.log.wandb else None
        return MetricsLog(
            self.output, total_steps=config.steps, first_step=self.progress.step, wandb_config=wandb_config
        )

    def _loop(self, meter: ThroughputMeter, log: MetricsLog | None) -> None:
        config, progress = self.config, self.progress
        pending: _Pending | None = None
        batches = iter(self.loader)
        meter.start()
        if self.stage.count > 1:
            logger.info("stage %d of %d, to step %d", self.stage.number, self.stage.count, self.stage.end)
        while progress.step < self.stage.end:
            self._profiler.begin(progress.step + 1)
            with meter.waiting():
                batch = next(batches)
            lr = stage_learning_rate(progress.step, self.stage)
            images = batch.images.to(self.ranks.device, non_blocking=True)
            lengths = batch.lengths if config.model.text_packing else None
            kept = self._patch_dropout(batch.keys, progress.step)
            teacher = self.teacher.features(batch, images) if self.teacher is not None else None
            result = self._step(images, batch.tokens, lr, lengths=lengths, kept=kept, teacher=teacher)
            numbers = HostCopy(result.numbers())
            # Waits until the previous step has finished, while the device has this one to work on.
            votes = agreed(
                self._read(pending),
                world_size=self.ranks.world_size,
                voted_in=progress.step,
                saved_after=self.writer.step,
            )
            progress.step += 1
            self._count(batch)
            meter.count(batch)
            pending = _Pending(progress.step, lr, numbers, batch.keys)
            if progress.step % config.log_every == 0 or progress.step == self.stage.end:
                self._log_row(pending, meter, log)
            with meter.stalled():
                self._checkpoint(pending, votes)
            with meter.paused():
                self._profiler.end(progress.step)
                self._evaluate(log, pending)
                if votes.listed and progress.step < self.stage.end:
                    self._renew_takedown()

    def _renew_takedown(self) -> None:
        """Leave out what is newly listed from the next step on. Collective."""
        takedown = self.takedown.renew(self.progress)
        if takedown is not None:
            self.loader.restart(self.progress.position, takedown)

    def _checkpoint(self, pending: _Pending, votes: Agreed) -> None:
        actions = self._save_policy.after(pending.step, votes, busy=self.writer.busy)
        if actions.advance:
            self.writer.advance()
        if actions.begin:
            self._read(pending)  # save only after checking that the numbers are finite
            self._save()
        if actions.finish:
            self.writer.finish()
        if actions.must_succeed and self.writer.failure is not None:
            raise self._not_saved()
        if actions.leave:
            raise self._stopped()

    def _not_saved(self) -> SaveError:
        return SaveError(
            f"step {self.progress.step} could not be saved: {self.writer.failure}; last good checkpoint: "
            f"{self.writer.last_good()}"
        )

    def _stopped(self) -> Stopped:
        reason = self.stop.requested or "a signal to another rank"
        return Stopped(
            f"{reason}: saved after step {self.progress.step} of {self.config.steps}; run the same command to resume"
        )

    def _evaluate(self, log: MetricsLog | None, pending: _Pending | None = None) -> None:
        """Evaluate the current weights if that is due and not done yet, and keep the best. Collective."""
        step, evaluation = self.progress.step, self.evaluation
        if evaluation is None or not evaluation.due(step):
            return
        missing = [log is not None and not log.was_evaluated(step)]
        dist.broadcast_object_list(missing, src=0)
        if not missing[0]:
            return
        self._read(pending)  # evaluating non-finite weights would be useless
        with naming_the_wait(self.ranks.rank, lambda: f"in the evaluation after step {step}"):
            try:
                found = evaluation.run(self.engine)
            except Interrupted:
                if not self._save_now():
                    raise self._not_saved() from None
                raise self._stopped() from None
            best = evaluation.is_best(found)
            if log is not None:
                row = {"step": step, "samples_seen": self.progress.samples_seen, "seconds": found.seconds}
                log.write_evaluation({**row, "best": best, "sets": found.sets})
                shown = "no number" if found.value is None else f"{found.value:.4f}"
                logger.info(
                    "evaluation after step %d: %s %s%s, %.1f s",
                    step,
                    found.metric,
                    shown,
                    ", the best so far" if best else "",
                    found.seconds,
                )
            if best and self._save_now():
                assert found.value is not None
                self.writer.mark_best(found.metric, found.value)
                evaluation.best = (found.metric, found.value)

    def _save_now(self) -> bool:
        """Save the current state, wait for it, and return whether it is on disk."""
        if self.writer.step != self.progress.step:
            self._save()
        self.writer.finish()
        return self.writer.failure is None

    def _log_row(self, pending: _Pending, meter: ThroughputMeter, log: MetricsLog | None) -> None:
        """Write a row for all ranks and the steps since the previous row. Collective."""
        self._read(pending)
        config, progress = self.config, self.progress
        epochs = epochs_in(self.loader.sources, progress.position, lanes=config.data.lanes)
        intervals = gather(meter.interval(progress.skipped, epochs), self.ranks)
        means, (_, _, logit_scale, *rest) = self._means.take(), pending.numbers.read()
        of_step = dict(zip(self._extra, rest, strict=False))
        if log is not None and intervals is not None:
            row = {
                "step": pending.step,
                "samples_seen": progress.samples_seen,
                "loss": means["loss"],
                **{name: means[name] for name in ("divergence",) if name in means},
                "logit_scale": logit_scale,
                **{name: of_step[name] for name in ("logit_bias",) if name in of_step},
                "lr": pending.lr,
                "grad_norm": means["grad_norm"],
                **rates(intervals, global_batch=config.global_batch, lanes=config.data.lanes),
            }
            log.write(row)
            if self._after_row is not None:
                self._after_row(row)

    def _count(self, batch: Batch) -> None:
        self.progress.samples_seen += self.config.global_batch
        self.progress.position.update(batch.position)
        self.progress.skipped.update(batch.skipped)

    def _read(self, pending: _Pending | None) -> VoteCounts:
        """Check that a step's numbers are finite; returns its votes."""
        if pending is None:
            return VoteCounts()
        loss, grad_norm, logit_scale, *rest = pending.numbers.read()
        extra, votes = dict(zip(self._extra, rest, strict=False)), rest[len(self._extra) :]
        numbers = {"loss": loss, "gradient norm": grad_norm, "logit_scale": logit_scale, **extra}
        for what, value in numbers.items():
            # All are the same on every rank, so every rank stops at the same step.
            if not math.isfinite(value):
                self.writer.finish()
                raise NonFiniteError(
                    f"{what} is {value} at step {pending.step}; last good checkpoint: "
                    f"{self.writer.last_good()}; keys of rank {self.ranks.rank}'s batch: {', '.join(pending.keys)}"
                )
        self._means.add(pending.step, loss=loss, grad_norm=grad_norm, **extra)
        return VoteCounts.of(votes)

    def _save(self) -> None:
        self.writer.begin(
            self.engine,
            step=self.progress.step,
            card=self.card,
            tokenizer_file=self.tokenizer.model_file,
            trainer={
                **self.progress.gathered(),
                **self.shards,
                **self.takedown.described(),
                **({"teacher": self.teacher.identity} if self.teacher is not None else {}),
                "config": config_to_dict(self.run_config),
                "world_size": self.ranks.world_size,
                "versions": {name: version(name) for name in _PACKAGES},
            },
        )
