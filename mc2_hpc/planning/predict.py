"""Predicts the time of a traced step on a GPU and a network. Everything here is a prediction, not a measurement.

Each class of kernels takes the larger of its flops over the achieved rate of products and its bytes over the achieved
rate of memory. Within a node, a collective takes the bytes that a rank sends over the rate of its link. A ring of all
ranks (:func:`sent_bytes`) leaves a node once: with NCCL, which makes several rings, through the links of all its GPUs,
with gloo through one. What ranks send to each other directly leaves through the sender's own link.

What the step computes at the same time hides part of them: DeepSpeed reduces gradients during backward only at ZeRO 2
and 3 (``overlap_comm``), ``zero.reduction: scatter`` does at ZeRO 1 too, and at ZeRO 3 DeepSpeed gathers parameters
during forward and backward. At ZeRO 1 and 2 a gather that is part of the forward pass
(:mod:`mc2_hpc.training.weight_gather`) is hidden by it, DeepSpeed's own at the end of the update is not. Nothing else
is hidden. At most the time of the phase itself can be.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mc2_hpc.config import RunConfig, ZeroConfig
from mc2_hpc.planning.machines import Gpu, Network
from mc2_hpc.planning.records import Collective, StepTrace
from mc2_hpc.precision import Precision


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A predicted step, in seconds."""

    compute: Mapping[str, float]
    """By class of kernels: the larger of flops and memory traffic."""
    limits: Mapping[str, str]
    """What limits each class: ``flops`` or ``memory``."""
    communication: Mapping[str, float]
    """By phase and kind, hidden or not."""
    exposed: float
    """Communication that computation does not hide."""

    @property
    def seconds(self) -> float:
        return sum(self.compute.values()) + self.exposed


def predict_step(trace: StepTrace, config: RunConfig, gpu: Gpu, network: Network, *, per_node: int) -> StepTime:
    """Predict the time of the step."""
    compute: dict[str, float] = {}
    limits: dict[str, str] = {}
    by_phase: dict[str, float] = {}
    for key, work in trace.work.items():
        phase, kernels = key.split("/")
        # torch.optim.Muon multiplies in bf16, whatever the run's precision.
        precision = Precision.BF16 if phase == "muon" else Precision(config.precision)
        by_flops, by_memory = kernel_seconds(kernels, work.flops, work.bytes, precision, gpu)
        seconds = max(by_flops, by_memory)
        compute[kernels] = compute.get(kernels, 0) + seconds
        limits[kernels] = "flops" if by_flops > by_memory else limits.get(kernels, "memory")
        by_phase[phase] = by_phase.get(phase, 0) + seconds
    communication: dict[str, float] = {}
    hideable: dict[str, float] = {}
    exposed = 0.0
    for collective in trace.collectives:
        if collective.host:
            continue  # exchanged before the step is launched, while the device computes the step before
        seconds = _collective_seconds(collective, trace, network, per_node=per_node)
        name = f"{collective.phase}: {collective.kind}"
        communication[name] = communication.get(name, 0) + seconds
        if _is_hidden(collective, config.zero):
            hideable[collective.phase] = hideable.get(collective.phase, 0) + seconds
        else:
            exposed += seconds
    exposed += sum(max(0.0, seconds - by_phase.get(phase, 0)) for phase, seconds in hideable.items())
    return StepTime(compute=compute, limits=limits, communication=communication, exposed=exposed)


def kernel_seconds(kernels: str, flops: float, size: float, precision: Precision, gpu: Gpu) -> tuple[float, float]:
    """Seconds of work of one class by its flops and by its bytes."""
    peak = gpu.flops if precision is Precision.BF16 else gpu.flops_fp32
    fraction = gpu.attention if kernels == "attention" else gpu.products
    return flops / (peak * fraction), size / (gpu.bytes_per_second * gpu.memory)


def _collective_seconds(collective: Collective, trace: StepTrace, network: Network, *, per_node: int) -> float:
    world_size = trace.world_size
    if world_size == 1:
        return 0.0
    per_node = min(per_node, world_size)
    nodes = world_size // per_node
    if collective.group == "node" or nodes == 1:
        sent, rate = sent_bytes(collective, per_node), network.within_node
    elif collective.group == "between":
        sent, rate = sent_bytes(collective, nodes), network.between_nodes
    elif collective.kind == "all-to-all":
        # Of the parts, those for the ranks of other nodes.
        sent, rate = collective.bytes * (nodes - 1) / nodes, network.between_nodes
    elif collective.kind == "send":
        sent, rate = sent_bytes(collective, world_size), network.between_nodes
    else:
        sent = sent_bytes(collective, world_size)
        rings = per_node if trace.device == "cuda" else 1
        rate = min(network.within_node, rings * network.between_nodes)
    return sent / (rate * network.achieved)


def sent_bytes(collective: Collective, ranks: int) -> float:
    """Bytes that each of the ranks sends in a ring: (N - 1) / N of the buffer to gather or scatter, twice that to
    all-reduce."""
    share = (ranks - 1) / ranks
    return collective.bytes * {"all-reduce": 2 * share, "broadcast": 1.0, "send": 1.0}.get(collective.kind, share)


def _is_hidden(collective: Collective, zero: ZeroConfig) -> bool:
    if collective.phase == "forward":
        return True  # weights
    return (zero.stage >= 2 or zero.reduction == "scatter") and collective.phase == "backward"
