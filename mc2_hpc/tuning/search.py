"""Which settings are tried, for how many steps: moves of one setting each, then combinations, by successive halving.

The first trials are the config as it is given and the defaults of this package; the faster one is the start. Then come
moves from it, ordered by what its step waits for. The moves that were faster are combined, and half as many settings as
before are measured for twice as many steps, until two are left (Jamieson and Talwalkar 2016, arXiv 1502.07943). The
last two, one of them the config as it is given if that runs, are measured several times in turn: what disturbs a
machine for a minute disturbs both. Nothing is drawn at random: the same results lead to the same trials.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mc2_hpc.config import RunConfig, setting, with_settings
from mc2_hpc.tuning.breakdown import Breakdown
from mc2_hpc.tuning.machines import Machine
from mc2_hpc.tuning.record import TrialResult
from mc2_hpc.tuning.space import Settings, combinations, is_valid, leaner, moves, shipped

NOISE = 0.01
"""A smaller gain counts as none."""
TURNS = 3
"""How often each setting of the last round is measured."""
_EVEN = Breakdown(data=1, host=1, compute=1, network=1)

Measure = Callable[[Sequence[Settings], int, int], list[TrialResult]]
"""Measures settings for a number of steps, a number of times in turn; results are fewer once the time is up."""


def rungs(trials: int) -> list[int]:
    """How many settings are measured in each round after the first trials: as many as that number of trials allows,
    halved until two are left for the last round. What remains goes to the first; of less than four trials, all."""
    found: list[int] = []
    for first in range(1, trials + 1):
        sizes = [first]
        while sizes[-1] > 2 or sizes == [2]:
            sizes.append(max(2, -(-sizes[-1] // 2)))
        if sum(sizes) > trials:
            break
        found = sizes
    return [found[0] + trials - sum(found), *found[1:]] if found else []


@dataclass(kw_only=True)
class Search:
    """One search; :meth:`run` fills in the rest."""

    config: RunConfig
    machine: Machine
    that_fit: Callable[[Sequence[Settings]], list[Settings]]
    measure: Measure
    trials: int
    steps: int
    """Measured in each trial of the first round."""
    results: list[TrialResult] = field(default_factory=list)
    """In the order of the trials."""

    def run(self, first: Settings) -> None:
        """Search, beginning with ``first``: no change, or what makes the config fit."""
        start = self._start(first)
        if start is None:
            return
        sizes = rungs(self.trials - len(self.results))
        if not sizes:
            return
        measured = self._measured(self._moves(start, sizes[0]), self.steps)
        survivors = self._combined(start, measured)
        for number, size in enumerate(sizes[1:], start=1):
            found, is_last = self._fitting(survivors, size), number == len(sizes) - 1
            if is_last and self.given is not None and {} not in found:
                found[1:] = [{}]
            ran = self._measured(found, self.steps * 2**number, turns=TURNS if is_last else 1)
            survivors = [result.settings for result in _fastest(ran)]

    @property
    def best(self) -> TrialResult | None:
        """The fastest setting of the longest trials, or what was given if that gains nothing; None if nothing ran."""
        working = [result for result in self.results if result.ok]
        if not working:
            return None
        longest = max(result.steps for result in working)
        found = _fastest(result for result in working if result.steps == longest)[0]
        given = self.given
        if given is not None and found.pairs_per_second <= (1 + NOISE) * given.pairs_per_second:
            return given
        return found

    @property
    def given(self) -> TrialResult | None:
        """The longest trial of the config as it is given; None if it does not run."""
        own = [result for result in self.results if result.ok and not result.settings]
        return max(own, key=lambda result: result.steps, default=None)

    def _start(self, first: Settings) -> TrialResult | None:
        """Measure the first setting, leaner ones while memory does not suffice, and the defaults."""
        found = self._measured([first], self.steps)
        for each in leaner(self.config, self.machine):
            if not found or found[0].status != "out of memory" or len(self.results) >= self.trials:
                break
            if each != first:
                found = self._measured(self._fitting([each], 1), self.steps) or found
        if not found or not found[0].ok:
            return None
        if len(self.results) < self.trials:
            found += self._measured(self._fitting([shipped(self.config, self.machine)], 1), self.steps)
        return _fastest(found)[0]

    def _moves(self, start: TrialResult, count: int) -> list[Settings]:
        now = with_settings(self.config, start.settings)
        found = moves(now, self.machine, start.waits or _EVEN)
        return self._fitting((self._merged(start.settings, move) for move in found), count)

    def _combined(self, start: TrialResult, measured: Sequence[TrialResult]) -> list[Settings]:
        """Everything that was faster together, what gained more than noise together, the best alone, the combinations
        between; then the rest by rate. A change within the noise costs no trial of its own this way, and several of
        them may be worth one that is not."""
        faster = [
            (self._changed(start.settings, result.settings), result.pairs_per_second / start.pairs_per_second)
            for result in measured
            if result.ok and result.pairs_per_second > start.pairs_per_second
        ]
        clear = combinations([(settings, gain) for settings, gain in faster if gain > 1 + NOISE])
        found = [*combinations(faster)[:1], *clear[:1], *clear[-1:], *clear[1:-1]]
        together = [self._merged(start.settings, each) for each in found]
        return [*together, *(result.settings for result in _fastest([start, *measured]))]

    def _changed(self, start: Settings, settings: Settings) -> Settings:
        """The values that lead from one to the other; a key that is in neither is as given."""
        keys = [key for key in {**start, **settings} if start.get(key, _GIVEN) != settings.get(key, _GIVEN)]
        return {key: settings.get(key, setting(self.config, key)) for key in keys}

    def _merged(self, start: Settings, change: Settings) -> Settings:
        """Both together, without what is as given."""
        return {key: value for key, value in {**start, **change}.items() if value != setting(self.config, key)}

    def _fitting(self, settings: Iterable[Settings], count: int) -> list[Settings]:
        """The first ``count`` different settings that are valid and fit into memory."""
        found: list[Settings] = []
        for each in settings:
            if len(found) == count:
                break
            if each not in found and is_valid(self.config, each, self.machine):
                found += self.that_fit([each])
        return found

    def _measured(self, settings: Sequence[Settings], steps: int, turns: int = 1) -> list[TrialResult]:
        """Results of new settings, in order; those with the same number of steps are not measured again."""
        known = {(_frozen(result.settings), result.steps): result for result in self.results}
        new = [each for each in settings if (_frozen(each), steps) not in known]
        ran = self.measure(new, steps, turns) if new else []
        self.results += ran
        known |= {(_frozen(result.settings), result.steps): result for result in ran}
        return [known[_frozen(each), steps] for each in settings if (_frozen(each), steps) in known]


_GIVEN = object()


def _fastest(results: Iterable[TrialResult]) -> list[TrialResult]:
    """The results that are ok, fastest first."""
    return sorted((result for result in results if result.ok), key=lambda result: -result.pairs_per_second)


def _frozen(settings: Settings) -> tuple[tuple[str, object], ...]:
    return tuple(sorted(settings.items()))
