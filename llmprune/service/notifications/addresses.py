"""Network addresses that a webhook may have: public ones, so that a user cannot reach the operator's network."""

from __future__ import annotations

import ipaddress
import re
import socket

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address


def refusal_of(address: Address) -> str | None:
    """Return why an address may not be called; None where it is public."""
    for one in (address, *_embedded(address)):
        if not one.is_global or one.is_multicast or one.is_reserved:
            return f"{address} is no public address"
    return None


def literal_address(host: str) -> Address | None:
    """Return the address that a host of a URL is, in any form that resolvers accept; None for a name.

    ``0x7f.1`` and ``2130706433`` are 127.0.0.1 too.
    """
    try:
        return ipaddress.ip_address(host.strip("[]").split("%")[0])
    except ValueError:
        pass
    if re.fullmatch(r"[0-9a-fx.]+", host, re.ASCII | re.IGNORECASE):
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None
    return None


def resolved(host: str, port: int) -> list[Address]:
    """Return all addresses of a host. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(where[0]).split("%")[0]) for *_, where in dict.fromkeys(found)]


def _embedded(address: Address) -> list[Address]:
    """Return the IPv4 addresses that an IPv6 address leads to."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found: list[Address] = [one for one in (address.ipv4_mapped, address.sixtofour) if one is not None]
    if address.teredo is not None:
        found += address.teredo
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return found
