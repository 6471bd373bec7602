"""Time limits for every request of the hub client, and so of datasets, transformers and lm-eval, which use it.

The client sets none for most requests and would wait forever for a hub or a proxy that accepts a connection and does
not answer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llmprune.common.waiting import announce_wait

if TYPE_CHECKING:
    from httpx2 import Client, Request, Response

# Seconds.
_CONNECT = 10.0
_READ = 30.0  # until the next bytes of an answer
_PROCESS = 120.0  # until the answer to an upload: the hub checks large files before it answers
_WRITE = 60.0  # until the next bytes are accepted


@lru_cache(maxsize=1)
def limit_waits() -> None:
    """Set time limits for all requests of the hub client; those that take longer than 5 s are logged."""
    from huggingface_hub import set_client_factory

    set_client_factory(_client)


def _client() -> Client:
    from huggingface_hub.utils._http import default_client_factory

    client: Client = default_client_factory()
    send = client.send

    def send_in_time(request: Request, **options: Any) -> Response:
        request.extensions["timeout"] = _limits(request)
        with announce_wait(f"the hub at {request.url.netloc.decode()}", f"{request.method} {request.url.path}"):
            response: Response = send(request, **options)
        return response

    client.send = send_in_time  # type: ignore[method-assign]
    return client


def _limits(request: Request) -> dict[str, float]:
    """Return the limits that the caller of the request set, and ours for all others, in seconds."""
    given = {name: limit for name, limit in request.extensions.get("timeout", {}).items() if limit is not None}
    read = _READ if request.method in ("GET", "HEAD") else _PROCESS
    return {"connect": _CONNECT, "read": read, "write": _WRITE, "pool": _PROCESS} | given
