"""Listening sockets of the service, opened before anything else starts."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from llmprune.common.errors import RecipeError


@contextmanager
def listening(host: str, port: int, *, backlog: int) -> Iterator[list[socket.socket]]:
    """Listen on every address of a host. Raises RecipeError where the host or the port cannot be used."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"--host {host}: {error}; give an address of this machine, such as 127.0.0.1") from error
    with ExitStack() as stack:
        yield [
            stack.enter_context(_listener(family, address, host=host, port=port, backlog=backlog))
            for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found)
        ]


def _listener(
    family: socket.AddressFamily,
    address: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes],
    *,
    host: str,
    port: int,
    backlog: int,
) -> socket.socket:
    # asyncio sends at once (TCP_NODELAY) only on sockets that name TCP; else an answer may wait 40 ms for an ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port is free at once after a restart
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has its own socket
        listener.bind(address)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise RecipeError(_reason(error, host, port=port)) from error
    return listener


def _reason(error: OSError, host: str, *, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port {port}: another program listens on {host}:{port} already; stop it, or give another --port"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"--port {port}: you may not listen on {host}:{port} ({error.strerror}); give a --port above 1023"
    return f"--host {host}: cannot listen there ({error.strerror or error}); give an address of this machine"
