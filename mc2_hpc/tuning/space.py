"""The settings that may be tuned: they change how fast a run is, never what it trains.

Every other setting is left as it is. Two kinds of difference remain: sums in another order (``micro_batch``,
``model.recompute``, the backends, ZeRO), whose size the tests of each bound; and ``data.decode``, whose backends round
pixels differently (docs/data.md).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mc2_hpc.config import RunConfig, setting, with_settings
from mc2_hpc.data.decode import AUTO
from mc2_hpc.data.lanes import rank_batches
from mc2_hpc.errors import UserError
from mc2_hpc.models.presets import num_parameters, resolve
from mc2_hpc.training.step import num_micro_batches
from mc2_hpc.tuning.breakdown import CAUSES, Breakdown, Cause
from mc2_hpc.tuning.machines import Machine

_MOST_PREFETCH = 8
_MOST_PASSES = 8
"""Of a step, to fit into memory: beyond it little more is saved, and tracing takes long."""
_BUCKETS = (500_000_000, 50_000_000)

Settings = Mapping[str, Any]
"""Values by ``key.sub``."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A setting that may be tuned."""

    key: str
    values: Callable[[RunConfig, Machine], Iterable[Any]]
    """Other values worth a trial, the most promising first; those that a config refuses are skipped."""
    helps: tuple[Cause, ...]
    """What it may make shorter."""


def _pairs(config: RunConfig, machine: Machine) -> int:
    """The largest share of a rank."""
    return max(rank_batches(config.global_batch, lanes=config.data.lanes, num_ranks=machine.ranks))


def _recompute(config: RunConfig, machine: Machine) -> Sequence[str]:
    """Only less of it: more is never faster by itself."""
    kinds = ("none", "selective", "full")
    return kinds[: kinds.index(config.model.recompute)]


def _micro_batches(config: RunConfig, machine: Machine) -> Iterator[int]:
    if config.micro_batch:
        yield 0
        if 2 * config.micro_batch < _pairs(config, machine):
            yield 2 * config.micro_batch


def _loss_backends(config: RunConfig, machine: Machine) -> Iterator[str]:
    used = config.loss.backend
    if used == "auto":
        used = "triton" if machine.has_triton and config.precision != "fp32" else "tiled"
    choices = ("triton", "tiled") if machine.has_triton else ("tiled", "reference")
    yield from (name for name in choices if name != used)


def _attention(config: RunConfig, machine: Machine) -> Iterator[str]:
    if machine.has_xformers:
        yield "xformers"
    if config.model.attention == "xformers":
        yield "sdpa"


def _fused(key: str) -> Callable[[RunConfig, Machine], Iterator[str]]:
    """Values of ``model.norm`` and ``model.activation``, whose default on a GPU is Triton's kernels."""

    def values(config: RunConfig, machine: Machine) -> Iterator[str]:
        fused = setting(config, key) in ("auto", "triton") and machine.has_triton
        if machine.has_triton:
            yield "torch" if fused else "triton"
        elif setting(config, key) not in ("auto", "torch"):
            yield "torch"

    return values


def _compile(config: RunConfig, machine: Machine) -> Iterator[bool]:
    if config.model.compile or machine.can_compile:
        yield not config.model.compile


def _stages(config: RunConfig, machine: Machine) -> Iterable[int]:
    return (1, 0, 2) if machine.ranks > 1 else (0, 1)


def _if_several(*choices: Any) -> Callable[[RunConfig, Machine], Iterable[Any]]:
    return lambda config, machine: choices if machine.ranks > 1 else ()


def _buckets(config: RunConfig, machine: Machine) -> Iterable[int]:
    try:
        size = num_parameters(resolve(config.model))
    except UserError:
        return ()
    if machine.ranks == 1 or config.zero.stage == 0:
        return ()
    return [bucket for bucket in _BUCKETS if min(bucket, size) != min(config.zero.bucket_elements, size)]


def _most_workers(config: RunConfig, machine: Machine) -> int:
    return min(max(1, config.data.lanes // machine.ranks), 2 * machine.cores_per_rank)


def _more_workers(config: RunConfig, machine: Machine) -> Iterator[int]:
    workers, most = config.data.workers, _most_workers(config, machine)
    for value in (2 * workers, workers + 1, machine.cores_per_rank - 1):
        if workers < value <= most:
            yield value


def _fewer_workers(config: RunConfig, machine: Machine) -> Iterator[int]:
    """On a CPU decoding takes cores from computing; anywhere, more processes than cores only take turns."""
    workers = config.data.workers
    if machine.device_type == "cpu" or workers > machine.cores_per_rank:
        for value in (machine.cores_per_rank - 1, workers // 2, workers - 1):
            if 0 <= value < workers:
                yield value


def _prefetch(config: RunConfig, machine: Machine) -> Iterator[int]:
    if config.data.workers and config.data.prefetch < _MOST_PREFETCH:
        yield min(2 * config.data.prefetch, _MOST_PREFETCH)


def _decode(config: RunConfig, machine: Machine) -> Iterator[str]:
    if machine.has_dali and config.data.features is None and config.distill is None:
        yield "dali"
    if config.data.decode not in ("auto", AUTO["train"]):
        yield AUTO["train"]


TUNED: tuple[Tuned, ...] = (
    Tuned(key="model.recompute", values=_recompute, helps=("compute", "host")),
    Tuned(key="micro_batch", values=_micro_batches, helps=("compute", "host", "network")),
    Tuned(key="model.text_packing", values=lambda *_: (True,), helps=("compute",)),
    Tuned(key="model.attention", values=_attention, helps=("compute",)),
    Tuned(key="model.norm", values=_fused("model.norm"), helps=("compute", "host")),
    Tuned(key="model.activation", values=_fused("model.activation"), helps=("compute", "host")),
    Tuned(key="data.workers", values=_fewer_workers, helps=("compute", "host")),
    Tuned(key="loss.backend", values=_loss_backends, helps=("compute",)),
    Tuned(key="model.compile", values=_compile, helps=("host", "compute")),
    Tuned(key="zero.stage", values=_stages, helps=("network", "host")),
    Tuned(key="model.embedding", values=_if_several("sharded", "dense"), helps=("network", "compute")),
    Tuned(key="loss.exchange", values=_if_several("all_gather", "ring"), helps=("network",)),
    Tuned(key="zero.bucket_elements", values=_buckets, helps=("network",)),
    Tuned(key="data.workers", values=_more_workers, helps=("data",)),
    Tuned(key="data.decode", values=_decode, helps=("data",)),
    Tuned(key="data.prefetch", values=_prefetch, helps=("data",)),
)
"""In the order of what usually gains most."""

KEYS = tuple(dict.fromkeys(each.key for each in TUNED))


def text_of(settings: Settings) -> list[str]:
    """As ``key.sub=value`` words, as a command line has them."""
    return [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in sorted(settings.items())
    ]


def name_of(settings: Settings) -> str:
    """The settings for a line of text, as a command line has them."""
    return " ".join(text_of(settings)) or "as given"


def is_valid(config: RunConfig, settings: Settings, machine: Machine) -> bool:
    """Whether the config accepts the settings together, on that many ranks."""
    try:
        num_micro_batches(with_settings(config, settings), machine.ranks)
    except UserError:
        return False
    return True


def _trades(config: RunConfig) -> list[Settings]:
    """Blocks computed again in place of whole features: both keep less in memory, and one of them is enough."""
    if config.micro_batch == 0 or config.model.recompute == "full":
        return []
    kinds = ("selective", "full") if config.model.recompute == "none" else ("full",)
    return [{"micro_batch": 0, "model.recompute": kind} for kind in kinds]


def moves(config: RunConfig, machine: Machine, waits: Breakdown) -> list[Settings]:
    """Changes of one setting each (or a trade of two), ordered by what the step of ``config`` waits for.

    Each cause gets a share of the first places that is proportional to its share of the step, and the second value of a
    setting comes later than the first of others.
    """
    offered: list[tuple[Settings, tuple[Cause, ...]]] = [(trade, ("compute",)) for trade in _trades(config)]
    for each in TUNED:
        offered += [({each.key: value}, each.helps) for value in each.values(config, machine)]
    counts: dict[Cause, int] = dict.fromkeys(CAUSES, 0)
    worth: list[tuple[float, Settings]] = []
    for move, helps in offered:
        known = any(move == other for _, other in worth)
        if known or any(value == setting(config, key) for key, value in move.items()):
            continue
        if is_valid(config, move, machine):
            value, cause = max((float(getattr(waits, cause)) / (1 + counts[cause]), cause) for cause in helps)
            before = sum(move.keys() == other.keys() for _, other in worth)
            counts[cause] += before == 0
            value /= 1 + 2 * before
            worth.append((value, move))
    return [move for _, move in sorted(worth, key=lambda each: -each[0])]  # stable: equal ones in the table's order


def shipped(config: RunConfig, machine: Machine) -> Settings:
    """The defaults of all tuned settings where they differ, and a decoding process per core that no rank needs."""
    standard = RunConfig()
    values = {key: setting(standard, key) for key in KEYS}
    values["data.workers"] = min(_most_workers(config, machine), max(1, machine.cores_per_rank - 1))
    return {key: value for key, value in values.items() if value != setting(config, key)}


def leaner(config: RunConfig, machine: Machine) -> list[Settings]:
    """Changes that need less and less memory, the leanest last."""
    steps: list[dict[str, Any]] = [{"model.recompute": "selective"}, {"model.recompute": "full"}]
    full: dict[str, Any] = {"model.recompute": "full", "model.embedding": "sharded", "model.text_packing": True}
    if machine.ranks > 1:
        steps.append({**full, "zero.stage": max(2, config.zero.stage)})
        divided = {"zero.stage": 3, "model.compile": False}
        if is_valid(config, divided, machine):
            full |= divided
    pairs = _pairs(config, machine)
    micro_batch = config.micro_batch or pairs
    while micro_batch > 1 and -(-pairs // micro_batch) < _MOST_PASSES:
        micro_batch = -(-micro_batch // 2)
        steps.append({**full, "micro_batch": micro_batch})
    found: list[Settings] = []
    for step in steps:
        changed = {key: value for key, value in step.items() if value != setting(config, key)}
        if changed and changed not in found and is_valid(config, changed, machine):
            found.append(changed)
    return found


def fattest(machine: Machine) -> list[Settings]:
    """The settings that need most memory; if they fit, all do."""
    values: dict[str, Any] = {key: False for key in ("model.compile", "model.text_packing")}
    values |= {"micro_batch": 0, "model.recompute": "none", "model.embedding": "dense", "loss.exchange": "all_gather"}
    values |= {"model.norm": "torch", "model.activation": "torch"}
    values["loss.backend"] = "tiled" if machine.has_triton else "reference"
    return [{**values, "zero.stage": stage} for stage in (0, 2)]


def combinations(gains: Sequence[tuple[Settings, float]]) -> list[Settings]:
    """All changes that gained together, then without the one that gained least, and so on down to the best alone.

    Args:
        gains: changes with their gain; of several for one setting the best counts.
    """
    best: dict[str, tuple[Settings, float]] = {}
    for settings, gain in sorted(gains, key=lambda each: -each[1]):
        for key in settings:
            best.setdefault(key, (settings, gain))
    ordered = sorted({id(each[0]): each for each in best.values()}.values(), key=lambda each: -each[1])
    found: list[Settings] = []
    for number in range(len(ordered), 0, -1):
        merged: dict[str, Any] = {}
        for settings, _ in reversed(ordered[:number]):
            merged |= settings
        if merged not in found:
            found.append(merged)
    return found
