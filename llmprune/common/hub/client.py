"""Requests to the hub: retries, time limits, and the commit that a revision stands for."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from llmprune.common.hub.errors import chain_of, is_silence, retry_after_seconds, status_of
from llmprune.common.hub.secrets import redact_logs
from llmprune.common.hub.time_limits import limit_waits

if TYPE_CHECKING:
    from huggingface_hub import ResolvedRevision
    from tenacity import RetryCallState

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 6  # with waits of 1, 2, 4, 8 and 16 s, unless the hub sends a Retry-After header
LONGEST_WAIT = 300.0  # seconds; a longer Retry-After is an error
_SILENT_ATTEMPTS = 2  # where connections are accepted and not answered: the hub client itself retries in each


def with_retries(request: Callable[[], T], reached: bool = True) -> T:
    """Make a request; retry where the hub is busy (429), fails (5xx) or the connection breaks.

    ``reached``: whether the hub answered an earlier request, so that a refused connection is worth a retry too.
    Raises the error of the last attempt.
    """
    from tenacity import Retrying, stop_after_attempt, wait_exponential

    redact_logs()
    limit_waits()
    growing = wait_exponential(multiplier=1, max=16)

    def wait(state: RetryCallState) -> float:
        requested = _requested_wait(_error_of(state))
        return growing(state) if requested is None else requested

    def again(state: RetryCallState) -> bool:
        error = _error_of(state)
        if error is None or (is_silence(error) and state.attempt_number >= _SILENT_ATTEMPTS):
            return False
        return _is_transient(error, reached)

    def log(state: RetryCallState) -> None:
        error = _error_of(state)
        assert error is not None, "only an error is retried"
        status = status_of(error)
        event = f"the hub answered {status}" if status else f"the connection to the hub broke ({type(error).__name__})"
        logger.warning("%s: trying again in %.0f s", event, state.upcoming_sleep)

    retrying = Retrying(
        retry=again, wait=wait, stop=stop_after_attempt(ATTEMPTS), before_sleep=log, sleep=_sleep, reraise=True
    )
    return retrying(request)


@lru_cache
def resolve_revision(repo_id: str, revision: str | None = None, *, repo_type: str = "model") -> ResolvedRevision:
    """Resolve a branch, tag or commit of a repository to a commit: one and the same for all that a run reads.

    ``cache_clear`` makes the next call ask again. Offline, or where the hub cannot be reached, the local cache
    answers. Raises the hub client's errors.
    """
    from huggingface_hub import HfApi

    return with_retries(
        lambda: HfApi().resolve_revision(repo_id, repo_type=repo_type, revision=revision), reached=False
    )


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _is_transient(error: BaseException, reached: bool) -> bool:
    """Check whether the same request may succeed a little later."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    for link in chain_of(error):
        if isinstance(link, HfHubHTTPError):
            status = link.response.status_code
            return (status == 429 or status >= 500) and (_requested_wait(link) or 0) <= LONGEST_WAIT
        if isinstance(link, httpx2.ConnectError | httpx2.ConnectTimeout):
            return reached
        if isinstance(link, httpx2.ProxyError):
            return False
        if isinstance(link, httpx2.TransportError | json.JSONDecodeError):
            return True
    return False


def _requested_wait(error: BaseException | None) -> float | None:
    """Return the seconds that the hub asks to wait; None where it asks for none."""
    response = getattr(error, "response", None)
    return None if response is None else retry_after_seconds(response.headers.get("Retry-After", ""))
