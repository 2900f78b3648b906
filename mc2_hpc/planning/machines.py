"""The GPUs and networks that a step is predicted for: tables with the source of every number."""

from dataclasses import dataclass
from pathlib import Path

from mc2_hpc.config import read_yaml, typed
from mc2_hpc.errors import UserError
from mc2_hpc.reading.checks import choose
from mc2_hpc.reading.yaml_file import Section

_HERE = Path(__file__).parent
GPUS, NETWORKS = _HERE / "gpus.yaml", _HERE / "networks.yaml"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One row of the table, or a file of ``--gpu``: a GPU, or what a rank has of a CPU."""

    device: str = "cuda"
    """``cuda`` or ``cpu``: what a step is traced for."""
    flops: float
    """Peak of bf16 products, dense, per second."""
    flops_fp32: float
    bytes_per_second: float
    """Peak of memory."""
    memory_bytes: float
    source: str
    """Where the numbers above are from."""
    products: float
    """Fraction of the peak that matrix products reach."""
    attention: float
    memory: float
    """Fraction of the memory's peak that other kernels reach."""
    fractions_source: str
    network: str = "ndr"
    """Name of the usual one, as for ``--network``."""

    def __post_init__(self) -> None:
        choose("device", self.device, ("cuda", "cpu"))
        for name in ("flops", "flops_fp32", "bytes_per_second", "memory_bytes"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("products", "attention", "memory"):
            _check_fraction(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Network:
    """One row of the table, or a file of ``--network``."""

    within_node: float
    """Bytes per second and direction of a GPU to the others of its node."""
    between_nodes: float
    achieved: float
    source: str
    achieved_source: str

    def __post_init__(self) -> None:
        for name in ("within_node", "between_nodes"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: must be above 0")
        _check_fraction("achieved", self.achieved)


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{name}={value}: is a fraction of a peak, above 0 and at most 1")


def read_gpu(name: str) -> Gpu:
    """The GPU of that name, or the one that a YAML file describes.

    Raises:
        UserError: neither; or a value is missing or out of range.
    """
    return typed(Gpu, _section(name, GPUS, "GPU", "--gpu"), source=name)


def read_network(name: str) -> Network:
    """The network of that name or file.

    Raises:
        UserError: as :func:`read_gpu`.
    """
    return typed(Network, _section(name, NETWORKS, "network", "--network"), source=name)


def _section(name: str, table: Path, what: str, flag: str) -> Section:
    known = read_yaml(table, f"table of {what}s")
    if name in known.entries:
        found = known.entries[name]
        assert isinstance(found, Section)
        return found
    if Path(name).suffix in (".yaml", ".yml"):
        return read_yaml(name, f"{what} file")
    raise UserError(f"{flag} {name}: choose one of {', '.join(known.entries)}, or a YAML file with the keys of {table}")
