"""``mc2 tune``: plan, measure, report.

out/trials.jsonl           one line per trial that has ended; what a restart does not repeat
out/trials/<key>/          config, log and output of each trial
out/synthetic/             shards of ``--synthetic``
out/best.yaml              the best settings, as overrides
out/tune.json, tune.png    all trials, and their plot
"""

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mc2_hpc import __version__
from mc2_hpc.config import RunConfig, config_to_dict, load_config, with_settings
from mc2_hpc.data.decode import resolve_backend
from mc2_hpc.data.lanes import check_ranks
from mc2_hpc.data.pools import OpenSource, open_sources
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.storage import exclusive_folder, fingerprint
from mc2_hpc.training.step import num_micro_batches
from mc2_hpc.tuning.fitting import Fitting
from mc2_hpc.tuning.machines import Machine, examine
from mc2_hpc.tuning.record import Record, TrialResult, combined, run_hash, trial_key
from mc2_hpc.tuning.search import Search
from mc2_hpc.tuning.space import Settings, name_of
from mc2_hpc.tuning.synthetic import synthetic_data
from mc2_hpc.tuning.trial import LocalRunner, Runner, Trial

logger = logging.getLogger(__name__)

_FIRST_SHARE = 0.5
"""Of the time, for the first trial."""
_PATIENCE, _PATIENCE_S = 4, 60.0
"""A later trial may take this many times as long as the first, and this many seconds more: to compile."""

_MOST_STAMPS = 256
"""Shards whose size and time tell data that were written again."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was measured."""

    config: RunConfig
    """As given, with the command's overrides and without the settings of ``--synthetic``."""
    machine: Machine
    results: Sequence[TrialResult]
    """In the order of the trials."""
    best: TrialResult
    given: TrialResult | None
    """The config as it is given; None if it does not fit."""

    @property
    def gain(self) -> float | None:
        """How many times as fast as the config as it is given."""
        return None if self.given is None else self.best.pairs_per_second / self.given.pairs_per_second

    def to_json(self) -> dict[str, Any]:
        """For ``tune.json`` and ``--json``."""
        return {
            "machine": {"name": self.machine.name, "device": self.machine.device_type, "ranks": self.machine.ranks},
            "best": dict(self.best.settings),
            "pairs_per_second": self.best.pairs_per_second,
            "gain": self.gain,
            "limit": self.best.waits.limit if self.best.waits is not None else None,
            "trials": [
                {
                    "settings": dict(each.settings),
                    "steps": each.steps,
                    "turns": each.turns,
                    "status": each.status,
                    "seconds": each.seconds,
                    "error": each.error,
                    "pairs_per_second": each.pairs_per_second,
                    "slowest": each.slowest,
                    "fastest": each.fastest,
                    "waits": None
                    if each.waits is None
                    else {cause: getattr(each.waits, cause) for cause in each.waits.__struct_fields__},
                    "limit": None if each.waits is None else each.waits.limit,
                }
                for each in self.results
            ],
        }


def tune(
    path: str | Path,
    overrides: Sequence[str],
    out: Path,
    *,
    trials: int,
    minutes: float,
    steps: int,
    ranks: int | None = None,
    synthetic: bool = False,
    caption_tokens: float,
    machine: Machine | None = None,
    runner: Runner | None = None,
) -> Tuning:
    """Measure at most ``trials`` settings of the run in at most ``minutes``; what an earlier call measured counts.

    Args:
        ranks: on this machine; None is one per GPU, or a single one.
        steps: measured in each of the first trials.
        caption_tokens: mean length of a caption, for the plan of the memory.
        machine: where ``runner`` runs the trials; this one if None.

    Raises:
        UserError: a config that cannot train, missing data, a batch that cannot fit, or no time for a single trial.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError("mc2 tune starts its own processes: run it outside of a launched job (WORLD_SIZE is set)")
    given = load_config(path, list(overrides))
    with exclusive_folder(out):
        machine = machine or examine(ranks)
        config = given
        _check(given, machine)
        if synthetic:
            config = with_settings(given, synthetic_data(given, out / "synthetic", ranks=machine.ranks), str(path))
        sources = open_sources(config.data) if synthetic else _checked_sources(config)
        fitting = Fitting(config, machine, caption_tokens=caption_tokens)
        if fitting.unknown:
            logger.info("memory is not planned, so trials may run out of it: %s", fitting.unknown)
        first = fitting.first_that_fits()
        session = _Session(config, machine, sources, out, runner or LocalRunner(), minutes=minutes, path=str(path))
        search = Search(
            config=config,
            machine=machine,
            that_fit=fitting.that_fit,
            measure=session.measure,
            trials=trials,
            steps=steps,
        )
        search.run(first)
    best = search.best
    if best is None:
        raise UserError(_no_trial(search.results, str(path), minutes))
    return Tuning(config=given, machine=machine, results=search.results, best=best, given=search.given)


def _check(config: RunConfig, machine: Machine) -> None:
    """Raise a :class:`UserError` for what would fail every trial."""
    if config.stages:
        raise UserError("stages: each has a fastest setting of its own; tune one with stages=[] and its settings")
    check_ranks(machine.ranks, config.data.lanes)
    num_micro_batches(config, machine.ranks)
    resolve_backend(config.data.decode, "train")


def _checked_sources(config: RunConfig) -> list[OpenSource]:
    """The run's own data.

    Raises:
        UserError: shards or a tokenizer are missing.
    """
    if not config.data.train:
        raise UserError("data.train is not set: name the shards, or add --synthetic to tune without data")
    try:
        sources = open_sources(config.data)
        if config.data.tokenizer:
            Tokenizer(config.data.tokenizer, config.data.tokenizer_style, context_length=8)
    except UserError as error:
        raise UserError(f"{error}; or add --synthetic to tune without data") from None
    if not config.data.tokenizer and config.model.init_from is None:
        raise UserError("data.tokenizer is not set: name a sentencepiece model file, or add --synthetic")
    return sources


def _no_trial(results: Sequence[TrialResult], path: str, minutes: float) -> str:
    if results and results[0].status == "out of memory":
        least = name_of(results[-1].settings)
        return f"{path}: every setting ran out of memory, {least} too: lower global_batch, or use more ranks"
    return f"{path}: not a single trial ended within --minutes {minutes:g}: give it more, or fewer --steps"


class _Session:
    """Measures settings: answers from the record what is in it, runs the rest, and keeps to the time."""

    def __init__(
        self,
        config: RunConfig,
        machine: Machine,
        sources: Sequence[OpenSource],
        out: Path,
        runner: Runner,
        *,
        minutes: float,
        path: str,
    ) -> None:
        self._config, self._machine, self._out, self._runner, self._path = config, machine, out, runner, path
        self._record = Record(out)
        self._run = run_hash(_identity(config, machine, sources))
        self._until = time.monotonic() + 60 * minutes
        self._first_s = 60 * minutes * _FIRST_SHARE
        self._first: TrialResult | None = None

    def measure(self, settings: Sequence[Settings], steps: int, turns: int) -> list[TrialResult]:
        """Results in the order of ``settings``, without those that there was no time for.

        Args:
            turns: how often each is measured, in turn. If the time is up in between, what has fewer turns than others
                is compared with as many of theirs.

        Raises:
            UserError: the first trial of all cannot train.
        """
        rounds = [[self._trial(each, steps, turn) for each in settings] for turn in range(turns)]
        missing = [trial for trials in rounds for trial in trials if trial.key not in self._record.results]
        if missing:
            self._runner.run(missing, self._ended, until=self._until)
        ended = [
            [self._record.results[trial.key] for trial in trials if trial.key in self._record.results]
            for trials in zip(*rounds, strict=True)
        ]
        fewest = min((len(results) for results in ended if results), default=0)
        found = [combined(results[:fewest]) for results in ended if results]
        if self._first is None and found and found[0].ok:
            self._first = found[0]
        return found

    def _trial(self, settings: Settings, steps: int, turn: int) -> Trial:
        key = trial_key(self._run, settings, steps, turn)
        seconds = self._first_s
        if self._first is not None:
            longer = max(1.0, steps / self._first.steps)
            seconds = _PATIENCE_S + _PATIENCE * longer * self._first.seconds
        return Trial(
            key=key,
            config=self._config,
            settings=settings,
            steps=steps,
            folder=self._out / "trials" / key,
            ranks=self._machine.ranks,
            bound_s=seconds,
        )

    def _ended(self, result: TrialResult) -> None:
        if self._first is None and result.status in ("crash", "timeout"):
            # Nothing about the settings: it is not recorded, so that a cure helps.
            raise UserError(f"{self._path}: cannot train as it is: {result.error} (log: {self._out / result.log})")
        self._record.add(result)
        name = name_of(result.settings)
        if result.ok:
            limit = f", most of it {result.waits.limit}" if result.waits is not None else ""
            logger.info("%s, %d steps: %.1f pairs/s%s", name, result.steps, result.pairs_per_second, limit)
        else:
            logger.info("%s, %d steps: %s: %s", name, result.steps, result.status, result.error)


def _identity(config: RunConfig, machine: Machine, sources: Sequence[OpenSource]) -> dict[str, Any]:
    """What a trial's result depends on, besides its settings and steps."""
    values = config_to_dict(config)
    for name in ("output", "steps", "log_every", "checkpoint", "eval", "profile", "log"):
        del values[name]
    offered = dataclasses.asdict(machine)
    del offered["memory_bytes"]  # of a CPU it is what is free at the moment
    shards = [name for source in sources for name in source.shards.names]
    files = shards[:: -(-len(shards) // _MOST_STAMPS)]
    return {
        "config": values,
        "machine": offered,
        "shards": shards,
        "files": fingerprint([*map(Path, files), Path(config.data.tokenizer or os.devnull)]),
        "versions": [__version__, torch.__version__],
    }
