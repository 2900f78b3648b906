"""How ``mc2 curate fetch`` treats servers and images."""

from dataclasses import dataclass
from typing import Any

from mc2_hpc import __version__
from mc2_hpc.curation.fetching.addresses import AddressPolicy
from mc2_hpc.curation.fetching.robots import OPT_OUT
from mc2_hpc.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Limits apply to each worker; times are in seconds."""

    resize: int | None = None
    """Longest side in pixels; None keeps every image's bytes."""
    opt_out: tuple[str, ...] = OPT_OUT
    """Directives of ``X-Robots-Tag`` that are obeyed."""
    max_bytes: int = 16 << 20
    """Largest body, before and after decompression."""
    max_redirects: int = 5
    connections: int = 256
    host_connections: int = 4
    host_rate: float = 20.0
    """Requests per second to one host; 0 for no limit."""
    connect_timeout: float = 10.0
    """For finding the host, connecting and TLS."""
    timeout: float = 30.0
    """For a whole request, with its connection and body."""
    max_wait: float = 60.0
    """The longest wait that a server may ask for (Retry-After)."""
    retries: int = 3
    """How often an image is asked for again after the server was busy."""
    allow_addresses: tuple[str, ...] = ()
    """Networks that may be connected to although they are not public."""
    user_agent: str = f"mc2_hpc/{__version__}"

    def __post_init__(self) -> None:
        AddressPolicy(self.allow_addresses)
        if not (self.user_agent.isascii() and self.user_agent.isprintable() and self.user_agent.strip()):
            raise UserError(f"user agent {self.user_agent!r}: must be printable ASCII text, such as name/1.0 (address)")
        if self.resize is not None and not 16 <= self.resize <= 65_500:  # a JPEG has at most 65,535
            raise UserError(f"resize {self.resize}: must be 16 to 65,500 pixels")

    def settings(self) -> dict[str, Any]:
        """Those that decide what is fetched and stored; the others may change between two runs of a command."""
        return {
            "resize": self.resize,
            "opt_out": sorted(self.opt_out),
            "max_bytes": self.max_bytes,
            "max_redirects": self.max_redirects,
        }
