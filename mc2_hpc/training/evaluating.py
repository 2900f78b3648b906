"""Evaluation between two steps: all ranks run a suite on the current weights and see whether they are the best."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mc2_hpc.config import RunConfig
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.distributed import Ranks
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders.ours import OurEncoder
from mc2_hpc.evaluation.encoder import Encoder
from mc2_hpc.evaluation.results import leading_metric
from mc2_hpc.evaluation.suite import load_suite, run_suite, to_json
from mc2_hpc.models.weights import BEST, ModelCard, is_checkpoint, read_best
from mc2_hpc.precision import Precision
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.stop import StopRequest

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """Some rank was asked to stop during an evaluation; all ranks discard its results."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of one evaluation."""

    sets: Mapping[str, Mapping[str, Any]]
    """In the form of ``mc2_hpc.evaluation.suite.to_json``."""
    seconds: float
    metric: str
    """``<set>/<metric>`` that checkpoints are compared by."""
    value: float | None
    """None if that set could not be scored."""


class PeriodicEvaluation:
    """A run's suite, and the best value so far of the metric that compares its checkpoints."""

    def __init__(
        self, config: RunConfig, card: ModelCard, tokenizer: Tokenizer, ranks: Ranks, stop: StopRequest
    ) -> None:
        """
        Raises:
            UserError: the suite file is invalid, or ``eval.best`` names a set that is not in it.
        """
        assert config.eval.suite is not None
        root = [f"root={config.eval.root}"] if config.eval.root is not None else []
        self._suite = load_suite(config.eval.suite, root)
        self._wanted = config.eval.best
        if self._wanted is not None and self._wanted.partition("/")[0] not in self._suite.sets:
            raise UserError(
                f"eval.best={self._wanted}: {config.eval.suite} has no such set; write <set>/<metric> with one of "
                f"{', '.join(self._suite.sets)}"
            )
        self._config, self._card, self._tokenizer, self._ranks, self._stop = config, card, tokenizer, ranks, stop
        self.best: tuple[str, float] | None = None
        """Metric and value of the checkpoint kept as the best."""

    def due(self, step: int) -> bool:
        """Whether to evaluate the weights after ``step`` steps."""
        return step > 0 and (step % self._config.eval.every == 0 or step == self._config.steps)

    def restore_best(self, folder: Path) -> None:
        """Restore the best value that an earlier start of the run recorded in its checkpoints folder."""
        if not (folder / BEST).is_file():
            return
        try:
            name, metric, value = read_best(folder / BEST)
        except UserError as error:
            logger.warning("%s", error)
            return
        if is_checkpoint(folder / Path(name).name):
            self.best = (metric, value)

    def run(self, engine: Engine) -> Evaluation:
        """Score the engine's weights, or their moving average, on the suite. Collective.

        Raises:
            Interrupted: a rank was asked to stop; all ranks stop at the same batch.
        """
        begin = time.perf_counter()
        with engine.whole_model(ema=self._config.eval.ema) as model:
            # No identity, so nothing is cached: the next evaluation has other weights.
            dual = OurEncoder(model, self._card, self._tokenizer, eval_resize=self._suite.eval_resize)
            encoder = Encoder(
                dual,
                self._ranks,
                batch=self._config.eval.batch,
                precision=Precision(self._config.precision).untrained,
                between=self._check_stop,
            )
            sets = to_json(run_suite(self._suite, encoder))
        metric = self._wanted or (self.best[0] if self.best is not None else _leading(sets))
        name, _, number = metric.partition("/")
        value = sets.get(name, {}).get("mean", {}).get(number)
        if value is None:
            logger.warning("no %s in this evaluation: it cannot decide which checkpoint is best", metric)
        return Evaluation(sets=sets, seconds=time.perf_counter() - begin, metric=metric, value=value)

    def is_best(self, found: Evaluation) -> bool:
        """Whether it beats the best so far, or is the first."""
        if found.value is None:
            return False
        return self.best is None or self.best[0] != found.metric or self.best[1] < found.value

    def _check_stop(self) -> None:
        asked = torch.tensor(int(self._stop.requested is not None), device=self._ranks.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked:
            raise Interrupted


def _leading(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """``<set>/<metric>`` of the suite's first set that could be scored."""
    found = (f"{name}/{leading_metric(entry['mean'])}" for name, entry in sets.items() if "mean" in entry)
    return next(found, "of any set")
