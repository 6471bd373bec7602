"""Requests and waiting that the benchmarks of the service share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from llmprune.service.client.sync.client import Client


def submit_under(client: Client, key: str, text: str) -> str:
    """The id of the job that a recipe becomes under an idempotency key."""
    return client.submit(text, key=key).id


def wait_for(reached: Callable[[], Any], seconds: float = 600.0) -> Any:
    """The first answer that is something."""
    deadline = time.monotonic() + seconds
    while not (found := reached()):
        if time.monotonic() > deadline:
            sys.exit("what was waited for did not come")
        time.sleep(0.1)
    return found
