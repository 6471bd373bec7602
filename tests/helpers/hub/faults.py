"""Faults between client and hub: refusals, broken connections, flipped bytes, lost answers."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import Response

Message = MutableMapping[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]
Application = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


@dataclass
class Fault:
    """Fault of the first ``times`` requests whose ``METHOD path`` matches.

    ``status``: answered at once; ``cut``: bytes of the body after which the connection breaks; ``flip``: a byte of the
    body is changed; ``lose``: the request is processed and its answer lost; ``silent``: the request is never answered.
    """

    match: str
    status: int | None = None
    times: int = 10**6
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": "a fault of the test"}'
    cut: int | None = None
    flip: bool = False
    lose: bool = False
    silent: bool = False

    def applies(self, line: str) -> bool:
        """Check whether the fault applies to this request, and count it."""
        if self.times > 0 and re.search(self.match, line):
            self.times -= 1
            return True
        return False


class Faulty:
    """Plain ASGI application that applies faults to another one: it may break off in the middle of an answer."""

    def __init__(self, app: Application, faults: list[Fault], lines: list[str]) -> None:
        self.app, self.faults, self.lines = app, faults, lines

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Record the request, and answer it with or without a fault."""
        query = scope["query_string"].decode()
        line = f"{scope['method']} {scope['path']}{'?' + query if query else ''}"
        self.lines.append(line)
        fault = next((fault for fault in self.faults if fault.applies(line)), None)
        if fault is None:
            await self.app(scope, receive, send)
        elif fault.silent:
            while (await receive())["type"] != "http.disconnect":
                pass
        elif fault.status:
            headers = {"content-type": "application/json"} | fault.headers
            await Response(fault.body, fault.status, headers)(scope, receive, send)
        elif scope["method"] == "PUT" and fault.cut is not None:
            await _hang_up(fault.cut, receive, send)
        elif scope["method"] == "PUT" and fault.flip:
            await self.app(scope, _flipping(receive), send)
        else:
            await self.app(scope, receive, _breaking(fault, send))


async def _hang_up(after: int, receive: Receive, send: Send) -> None:
    """Read ``after`` bytes of the body, then announce an answer and close the connection."""
    read = 0
    while read < after:
        message = await receive()
        read += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
    await send({"type": "http.response.body", "body": b""})


def _flipping(receive: Receive) -> Receive:
    done = False

    async def flipped() -> Message:
        nonlocal done
        message = await receive()
        if not done and message.get("body"):
            done = True
            message["body"] = _other_byte(message["body"])
        return message

    return flipped


def _breaking(fault: Fault, send: Send) -> Send:
    sent = 0

    async def broken(message: Message) -> None:
        nonlocal sent
        body = message.get("body", b"")
        if fault.lose and message["type"] == "http.response.start":
            message["headers"] = [(b"content-length", b"1000000")]
        if fault.lose and body:
            message["body"] = b""
        if fault.flip and body and not sent:
            message["body"] = _other_byte(body)
        room = len(body) if fault.cut is None else max(fault.cut - sent, 0)
        sent += len(body)
        await send(message | {"body": message["body"][:room], "more_body": True} if body else message)
        if room < len(body):
            raise ConnectionAbortedError("cut by the test")

    return broken


def _other_byte(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])
