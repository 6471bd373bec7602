"""Connections that keep a server busy without asking anything: each phase of a request has a time limit.

A uvicorn protocol with a timer a connection, and a register of the connections that wait for a request. The register
closes the longest waiting one where an address, or all addresses together, have too many: a new connection is
never refused, so that health checks are answered whoever else holds connections.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

_MOST_WAITING = 32  # of one address; a browser holds 6
_MOST_CONNECTIONS = 4096
_REPORT_EVERY = 60.0  # seconds between two lines of the log about connections that were closed


@dataclass(frozen=True)
class Patience:
    """Seconds that a client may take for each phase of a request."""

    headers: float = 10.0  # from the connection, or the last answer, to the end of the headers
    body: float = 30.0
    reading: float = 60.0  # without taking a byte of an answer


@dataclass
class Register:
    """The connections of one server."""

    patience: Patience = Patience()
    trusted: Sequence[str] = ()  # addresses and networks of proxies, which hold connections for many clients
    most_waiting: int = _MOST_WAITING
    most: int = _MOST_CONNECTIONS
    _waiting: OrderedDict[LimitedProtocol, str] = field(default_factory=OrderedDict)
    _by_address: dict[str, OrderedDict[LimitedProtocol, None]] = field(default_factory=dict)
    _all: set[LimitedProtocol] = field(default_factory=set)
    _closed: Counter[str] = field(default_factory=Counter)
    _reported: float = float("-inf")

    def opened(self, connection: LimitedProtocol) -> None:
        """Count a new connection; close another where there are too many."""
        self._all.add(connection)
        if len(self._all) > self.most:
            self._close(next(iter(self._waiting), connection), "too many connections")

    def waits(self, connection: LimitedProtocol) -> None:
        """Note that a connection waits for a request; close the longest waiting one of its address if need be."""
        address = connection.address
        self._waiting[connection] = address
        of_address = self._by_address.setdefault(address, OrderedDict())
        of_address[connection] = None
        if len(of_address) > self.most_waiting and not is_among(address, self.trusted):
            self._close(next(iter(of_address)), "too many connections of one address")

    def works(self, connection: LimitedProtocol) -> None:
        """Note that a connection waits no longer."""
        address = self._waiting.pop(connection, None)
        if address is not None:
            of_address = self._by_address[address]
            del of_address[connection]
            if not of_address:
                del self._by_address[address]

    def lost(self, connection: LimitedProtocol) -> None:
        """Forget a connection."""
        self.works(connection)
        self._all.discard(connection)

    def timed_out(self, connection: LimitedProtocol) -> None:
        """Close a connection that took longer than it may."""
        self._close(connection, "too slow")

    def _close(self, connection: LimitedProtocol, reason: str) -> None:
        self.lost(connection)
        connection.transport.abort()
        self._closed[reason] += 1
        now = time.monotonic()
        if now - self._reported >= _REPORT_EVERY:  # a flood of connections must not become a flood of lines
            self._reported = now
            counts = ", ".join(f"{count} ({reason})" for reason, count in self._closed.items())
            logger.warning("connections closed since the last such line: %s", counts)
            self._closed.clear()


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol with a time limit for each phase."""

    def __init__(self, register: Register, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._register = register
        self._phase: object = None
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    @property
    def address(self) -> str:
        """The address at the other end."""
        return self.client[0] if self.client else "?"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._register.opened(self)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._register.lost(self)
        self._cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; the clock goes on too unless the phase is over."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """Start the clock for a client that does not read its answer."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self._register.patience.reading, self._register.timed_out, self)

    def resume_writing(self) -> None:
        """Stop that clock."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _watch(self) -> None:
        """Set the clock where another phase has begun."""
        phase = self.conn.their_state
        if phase is self._phase or self.transport.is_closing():
            return
        self._phase = phase
        self._cancel()
        if phase is h11.IDLE:
            self._register.waits(self)
        else:
            self._register.works(self)
        patience = self._register.patience
        seconds = {h11.IDLE: patience.headers, h11.SEND_BODY: patience.body}.get(phase)
        if seconds is not None:
            self._timer = self.loop.call_later(seconds, self._register.timed_out, self)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def is_among(address: str, networks: Sequence[str]) -> bool:
    """Return whether an IP address is one of these addresses or in one of these networks."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(found in ipaddress.ip_network(network, strict=False) for network in networks)


def allow_many_files() -> int:
    """Raise this process's limit of open files as far as it may; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * _MOST_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, 4 * _MOST_CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft if soft != resource.RLIM_INFINITY else wanted
