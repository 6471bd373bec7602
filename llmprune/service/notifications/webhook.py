"""Webhooks: a signed POST, by the conventions of https://www.standardwebhooks.com.

The host is resolved once, every address is checked, and the connection goes to a checked address: a name that
resolves to another address the second time changes nothing. Redirects are not followed, and no proxy is used.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

from llmprune import __version__
from llmprune.common.printing import printable
from llmprune.service.notifications.addresses import Address, refusal_of, resolved
from llmprune.service.notifications.key_file import SECRET_PREFIX
from llmprune.service.notifications.settings import NotificationSettings
from llmprune.service.notifications.targets import Target, host_is_listed, port_of, problem_of

_TIMEOUT = 10.0  # seconds for one answer of the network
_DEADLINE = 30.0  # seconds for all of it
_GONE = 410  # the receiver wants no more


class DeliveryError(Exception):
    """A notification was not delivered. ``permanent``: another try is of no use."""

    def __init__(self, reason: str, permanent: bool = False) -> None:
        super().__init__(reason)
        self.permanent = permanent


def signed_headers(message: str, body: bytes, *, secret: str, now: int) -> dict[str, str]:
    """Return the headers of a message: its id, its time in seconds since 1970, the signature of these and the body."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    content = b".".join((message.encode(), str(now).encode(), body))
    signature = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    return {"webhook-id": message, "webhook-timestamp": str(now), "webhook-signature": f"v1,{signature}"}


def post(url: str, body: bytes, *, headers: Mapping[str, str], settings: NotificationSettings) -> None:
    """Send a body. Raises DeliveryError for every answer that is no success."""
    problem = problem_of(Target("webhook", url), settings=settings)
    if problem:  # the operator's settings may have changed since it was given
        raise DeliveryError(problem, permanent=True)
    parts = urlsplit(url)
    connection = _Connection(parts, _checked_addresses(parts, settings))
    overtime = threading.Timer(_DEADLINE, connection.abort)
    overtime.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", path, body, _BASIC_HEADERS | dict(headers))
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        reason = "it took too long" if connection.is_aborted else printable(str(error) or type(error).__name__)
        raise DeliveryError(f"{parts.hostname} does not answer: {reason[:200]}") from error
    finally:
        overtime.cancel()
        connection.close()
    if not 200 <= status < 300:
        hint = "; redirects are not followed, give the final URL" if 300 <= status < 400 else ""
        raise DeliveryError(f"{parts.hostname} answered {status}{hint}", permanent=status == _GONE)


_BASIC_HEADERS = {"Content-Type": "application/json", "User-Agent": f"llmprune/{__version__}", "Connection": "close"}


class _Connection(http.client.HTTPConnection):
    """A connection to one of some addresses of a URL's host, whose certificate must be the host's."""

    is_aborted = False

    def __init__(self, url: SplitResult, addresses: Sequence[Address]) -> None:
        super().__init__(url.hostname or "", port_of(url), timeout=_TIMEOUT)
        self.default_port = 443 if url.scheme == "https" else 80  # the Host header leaves it out
        self._addresses, self._is_tls = addresses, url.scheme == "https"

    def connect(self) -> None:
        """Connect to the first address that answers."""
        plain = self._connected()
        self.sock = plain
        if self._is_tls:
            try:
                self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
            except BaseException:
                plain.close()
                raise

    def _connected(self) -> socket.socket:
        *others, last = self._addresses
        for address in others:
            with suppress(OSError):
                return socket.create_connection((str(address), self.port), _TIMEOUT)
        return socket.create_connection((str(last), self.port), _TIMEOUT)

    def abort(self) -> None:
        """Break the connection off, from another thread."""
        self.is_aborted = True
        if self.sock is not None:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


def _checked_addresses(url: SplitResult, settings: NotificationSettings) -> list[Address]:
    """Return the addresses of a URL's host. Raises DeliveryError where there is none, or one that is not allowed."""
    host = url.hostname or ""
    try:
        addresses = resolved(host, port_of(url))
    except (OSError, UnicodeError) as error:
        raise DeliveryError(f"the name {host} cannot be resolved") from error
    if not host_is_listed(url, settings.webhook_hosts) and any(map(refusal_of, addresses)):
        # which address it has is not said: that is the operator's network
        reason = f"{host} is not called, because it has no public address"
        raise DeliveryError(f"{reason}; the operator may allow it by serve --webhook-host")
    return addresses
