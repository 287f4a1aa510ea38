"""Which addresses a webhook may go to.

A name is resolved once for a connection; what came out is checked, and the connection goes to just that: a name that
means something else a moment later (DNS rebinding) gains nothing. The name stays in `Host` and in TLS.
"""

import ipaddress
import socket
from collections.abc import Callable

from aiohttp.abc import AbstractResolver, ResolveResult

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class AddressRefused(OSError):
    """A target's name leads to an address that is not public."""


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet. An IPv4 address inside of an IPv6 one counts as itself."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is None and found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found.is_site_local:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


class GuardedResolver(AbstractResolver):
    """Resolves with another resolver, and hands out addresses only where all of them are public.

    Raises:
        AddressRefused: one is not. The others are not tried: a name that leads to a private address is not trusted.
    """

    def __init__(self, inner: AbstractResolver, allowed: Callable[[str], bool] = is_public) -> None:
        self._inner = inner
        self._allowed = allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if any(not self._allowed(entry["host"]) for entry in found):
            raise AddressRefused(f"{host} leads to an address that is not public")
        return found

    async def close(self) -> None:
        await self._inner.close()
