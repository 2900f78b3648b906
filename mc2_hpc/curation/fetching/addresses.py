"""Which network addresses may be connected to: only those of the public internet, unless others are allowed by name.

The addresses in a pool come from strangers' pages, and redirects from strangers' servers. Without this check they could
make a cluster's nodes send requests to its own services: a metadata server, a database, a printer.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from mc2_hpc.errors import UserError

_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        # Addresses that ipaddress, depending on Python's version, counts as global (IANA's special-purpose registries).
        *("100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15"),
        *("64:ff9b:1::/48", "100::/64", "2001::/23", "3fff::/20", "5f00::/16", "fec0::/10"),
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")
_Address = IPv4Address | IPv6Address


class AddressRefused(OSError):
    """A connection to an address that is not allowed; every instance has the same text, which aiohttp relies on to
    raise one of them when a host has several addresses."""

    def __init__(self) -> None:
        super().__init__("address refused")


@dataclass(frozen=True)
class AddressPolicy:
    """Public addresses, and those in ``allowed`` networks (CIDR notation)."""

    allowed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        networks = []
        for network in self.allowed:
            try:
                networks.append(ip_network(network))
            except ValueError:
                raise UserError(
                    f"address {network!r}: must be an address or a network such as 10.0.0.0/8, without host bits"
                ) from None
        object.__setattr__(self, "_networks", networks)

    def allows(self, address: str) -> bool:
        """Whether the numeric ``address`` may be connected to; False if it is not a numeric address."""
        try:
            found = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        networks: Sequence[Any] = self._networks  # type: ignore[attr-defined]
        if any(one in network for one in (found, _embedded(found)) for network in networks):
            return True
        return is_public(found)

    def open_socket(self, info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
        """A socket for an entry of ``getaddrinfo``.

        The check is here, in the last step before connecting, so it applies to exactly the address that is connected
        to, whatever the name resolved to before.

        Raises:
            AddressRefused: the address is not allowed.
        """
        family, kind, protocol, _, place = info
        if not self.allows(place[0]):
            raise AddressRefused
        return socket.socket(family, kind, protocol)


def is_public(address: _Address) -> bool:
    """Whether an address belongs to one host on the public internet; one that contains an IPv4 address (mapped,
    compatible, 6to4, NAT64) must also contain a public one."""
    inner = _embedded(address)
    if inner != address:
        return is_public(inner)
    special = (
        address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
    )
    return address.is_global and not special and not any(address in network for network in _NOT_PUBLIC)


def _embedded(address: _Address) -> _Address:
    """The IPv4 address that packets to an IPv6 address end up at, if there is one."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
