"""Predicts the step at other numbers of GPUs from one trace, without tracing again.

Weak scaling keeps the pairs per GPU, strong scaling the global batch. Towers and their gradients do not depend on the
number of GPUs; with b pairs per rank of a global batch B, towers compute in proportion to b, the loss to b B, and the
loss moves messages in proportion to B. Muon's work is divided as a run of that size divides its matrices, and gradients
in bf16 are exchanged as it does, within nodes and between them (:mod:`mc2_hpc.training.piece_sums`). What AdamW and the
token table cost per rank is left as it was traced.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from mc2_hpc.config import RunConfig
from mc2_hpc.planning.machines import Gpu, Network
from mc2_hpc.planning.predict import StepTime, predict_step
from mc2_hpc.planning.records import Collective, StepTrace, Work

MOST_GPUS = 4096
SCALES = tuple(2**power for power in range(MOST_GPUS.bit_length()))
"""The numbers of GPUs: 1, 2, 4, ... :data:`MOST_GPUS`."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A predicted step at one number of GPUs."""

    gpus: int
    pairs_per_second: float
    seconds: float
    exposed: float
    """Seconds of communication that computation does not hide."""

    @property
    def network_bound(self) -> bool:
        """Whether exposed communication takes at least as long as computation."""
        return 2 * self.exposed >= self.seconds


def scaling(
    trace: StepTrace, config: RunConfig, gpu: Gpu, network: Network, *, per_node: int, strong: bool
) -> Iterator[Point]:
    """The step at each of :data:`SCALES`; strong scaling ends where a GPU has no whole pair."""
    for gpus in SCALES:
        pairs = config.global_batch / gpus if strong else trace.pairs
        if pairs < 1:
            return
        step = predict_step(_scaled(trace, gpus, pairs, per_node), config, gpu, network, per_node=per_node)
        yield _point(gpus, pairs, step)


def takes_over(points: Iterator[Point]) -> int | None:
    """The fewest GPUs at which the network bounds the step."""
    return next((point.gpus for point in points if point.network_bound), None)


def _point(gpus: int, pairs: float, step: StepTime) -> Point:
    return Point(gpus=gpus, pairs_per_second=gpus * pairs / step.seconds, seconds=step.seconds, exposed=step.exposed)


def _scaled(trace: StepTrace, gpus: int, pairs: float, per_node: int) -> StepTrace:
    own = pairs / trace.pairs
    whole = own * gpus / trace.world_size  # of the global batch
    factors = {"forward": own, "backward": own, "teacher": own, "loss": own * whole}
    if trace.muon_shares:
        factors["muon"] = trace.muon_shares[gpus] / trace.muon_shares[trace.world_size]
    work = {key: _times(each, factors.get(key.partition("/")[0], 1.0)) for key, each in trace.work.items()}
    collectives = tuple(
        dataclasses.replace(each, bytes=round(each.bytes * whole)) if each.phase == "loss" else each
        for traced in trace.collectives
        for each in (_levels(traced, gpus, per_node) if _is_of_gradients(traced) else (traced,))
    )
    return dataclasses.replace(trace, world_size=gpus, work=work, collectives=collectives)


def _is_of_gradients(collective: Collective) -> bool:
    return collective.kind == "all-to-all" and collective.phase == "backward"


def _levels(collective: Collective, gpus: int, per_node: int) -> tuple[Collective, ...]:
    """The exchange of gradients on as many GPUs, from its first level at the traced number."""
    if collective.group == "between":
        return ()
    if per_node == 1 or gpus <= per_node:
        return (dataclasses.replace(collective, group="all"),)
    between = dataclasses.replace(collective, group="between", bytes=collective.bytes // per_node)
    return dataclasses.replace(collective, group="node"), between


def _times(work: Work, factor: float) -> Work:
    return dataclasses.replace(work, flops=work.flops * factor, bytes=work.bytes * factor)
