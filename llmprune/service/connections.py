"""Connections that keep a server busy without asking anything: each phase of a request has a time limit.

A uvicorn protocol with a timer a connection, and a register of the connections that wait for a request. Where an
address, or all addresses together, have too many, the register closes the longest waiting one and not the new one, so
that health checks are answered whoever else holds connections. How many requests an address may have under way is
the gate's to limit (service/api/gate.py).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import resource
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

BACKLOG = 128  # connections that asyncio accepts in one go, before any of them can be closed
_MOST_WAITING = 32  # of one address; a browser holds 6
_MOST_CONNECTIONS = 4096
_OTHER_FILES = 256  # that the process holds open: job table, logs, downloads
_REPORT_EVERY = 60.0  # seconds between two lines of the log about connections that were closed

Phase = Literal["headers", "body", "answer"]


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
    _all: set[LimitedProtocol] = field(default_factory=set)
    _waiting: dict[str, OrderedDict[LimitedProtocol, None]] = field(default_factory=dict)  # by address, oldest first
    _closed: Counter[str] = field(default_factory=Counter)

    def opened(self, connection: LimitedProtocol) -> None:
        """Count a new connection; where there are too many, close one of the address with the most waiting ones."""
        self._all.add(connection)
        if len(self._all) > self.most:
            crowd = max(self._waiting.values(), key=len, default=OrderedDict({connection: None}))
            self._close(next(iter(crowd)), "too many connections")

    def waits(self, connection: LimitedProtocol) -> None:
        """Note that a connection waits for a request; close the longest waiting one of its address if need be."""
        waiting = self._waiting.setdefault(connection.address, OrderedDict())
        waiting[connection] = None
        if len(waiting) > self.most_waiting and not is_among(connection.address, self.trusted):
            self._close(next(iter(waiting)), "too many connections of one address")

    def works(self, connection: LimitedProtocol) -> None:
        """Note that a connection does not wait."""
        waiting = self._waiting.get(connection.address, OrderedDict())
        waiting.pop(connection, None)
        if not waiting:
            self._waiting.pop(connection.address, None)

    def lost(self, connection: LimitedProtocol) -> None:
        """Forget a connection."""
        self.works(connection)
        self._all.discard(connection)

    def timed_out(self, connection: LimitedProtocol) -> None:
        """Close a connection that took longer than it may."""
        self._close(connection, "too slow")

    def _close(self, connection: LimitedProtocol, reason: str) -> None:
        if not self._closed:  # a flood of connections must not become a flood of lines
            connection.loop.call_later(_REPORT_EVERY, self._report)
        self._closed[reason] += 1
        self.lost(connection)
        connection.transport.abort()

    def _report(self) -> None:
        counts = ", ".join(f"{count} ({reason})" for reason, count in self._closed.items())
        logger.warning("connections closed in the last minute: %s", counts)
        self._closed.clear()


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol with a time limit for each phase."""

    def __init__(self, register: Register, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._register = register
        self._phase: Phase = "answer"
        self._timer: asyncio.TimerHandle | None = None
        self._unread = math.inf  # bytes of answers that the client had not taken when the timer was last looked at

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
        self._stop()
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
        if self._phase == "answer":
            self._start(self._register.patience.reading)

    def resume_writing(self) -> None:
        """Stop that clock."""
        super().resume_writing()
        if self._phase == "answer":
            self._stop()

    def _watch(self) -> None:
        """Set the clock where another phase has begun; the rest of a refused body is a wait for the next request."""
        answering = self.cycle is not None and not self.cycle.response_complete
        phase: Phase = "headers"
        if answering:
            phase = "body" if self.conn.their_state is h11.SEND_BODY else "answer"
        if phase == self._phase or self.transport.is_closing():
            return
        self._phase = phase
        if phase == "headers":
            self._register.waits(self)
            self._start(self._register.patience.headers)
        else:
            self._register.works(self)
            if phase == "body":
                self._start(self._register.patience.body)
            else:
                self._stop()

    def _start(self, seconds: float) -> None:
        self._stop()
        self._unread = math.inf
        self._timer = self.loop.call_later(seconds, self._expired)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        """Close the connection, unless the client is still taking bytes of an answer, however slowly."""
        unread = self.transport.get_write_buffer_size()
        if unread and unread < self._unread:
            self._unread = unread
            self._timer = self.loop.call_later(self._register.patience.reading, self._expired)
        else:
            self._register.timed_out(self)


def is_among(address: str, networks: Sequence[str]) -> bool:
    """Return whether an IP address is one of these addresses or in one of these networks."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(found in ipaddress.ip_network(network, strict=False) for network in networks)


def most_connections() -> int:
    """Raise this process's limit of open files as far as it may; return how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + BACKLOG + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(1, wanted - BACKLOG - _OTHER_FILES)
