"""What every talk with the hub has in common: patience, one sentence for each failure, and no secret in it."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from llmprune.common.hub.time_limits import limit_waits
from llmprune.common.printing import printable

if TYPE_CHECKING:
    from huggingface_hub import ResolvedRevision
    from tenacity import RetryCallState

logger = logging.getLogger(__name__)

T = TypeVar("T")

HIDDEN = "***"
ATTEMPTS = 6  # with waits of 1, 2, 4, 8 and 16 s, unless the hub names its own
LONGEST_WAIT = 300.0  # seconds; where the hub asks for more, that is an error
_SILENT_ATTEMPTS = 2  # at a hub that accepts and does not answer: the hub client tries several times in each

_TOKEN = re.compile(r"\bhf_(?:[a-z]+_)?[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}")
_BEARER = re.compile(
    r"(?P<head>\bAuthorization\W{1,5})?\bBearer +(?P<token>[\w~+/=-]+(?:\.[\w~+/=-]+)*)", re.IGNORECASE
)
_PLACEHOLDER = re.compile(r"[A-Z]{1,15}|[A-Z]+(?:_[A-Z]+)+")  # TOKEN, HF_TOKEN: the name of a secret
_WORD = re.compile(r"[A-Z]?[a-z]{1,14}")  # of a sentence about bearer tokens
_USER = re.compile(r"(?<=://)(?<!\bhub://)[^/\s@]+@")  # hub://NAME@REVISION has no user
_ADDRESS = re.compile(r"https?://[^\s'\"<>]+")  # matched whole, so that the work grows with the text and not its square
_QUERY = re.compile(r"\?[^)]+")
_END = ".,;:!?"  # of the sentence around an address
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "HF_HUB_TOKEN")
_CHATTY = ("huggingface_hub", "transformers", "datasets", "llmprune")


def redact(text: str) -> str:
    """The text without tokens, and without the users and queries of addresses, where upload links are signed."""
    for secret in _own_tokens():
        text = text.replace(secret, HIDDEN)
    text = _BEARER.sub(_without_token, _TOKEN.sub(HIDDEN, text))
    return _ADDRESS.sub(_without_query, _USER.sub(f"{HIDDEN}@", text))


def has_token(text: str) -> bool:
    """Whether a text holds the user's own token, or what looks like one."""
    bearers = any(_without_token(found) != found[0] for found in _BEARER.finditer(text))
    return bearers or bool(_TOKEN.search(text)) or any(secret in text for secret in _own_tokens())


def scrub(error: BaseException) -> None:
    """Redact an error and all that it came from, in place: a traceback prints the whole chain."""
    for link in _chain(error):
        link.args = tuple(redact(part) if isinstance(part, str) else part for part in link.args)
        if isinstance(getattr(link, "server_message", None), str):
            link.server_message = redact(link.server_message)  # type: ignore[attr-defined]


class _Redacting(logging.Filter):
    """Takes secrets and control characters out of a message, which becomes one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(redact(record.getMessage())), None
        return True


def guard_logs() -> None:
    """Redact what llmprune and the hub's libraries log: the hub client names signed addresses when it retries."""
    for name in _CHATTY:
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(kind, _Redacting) for kind in handler.filters):
                handler.addFilter(_Redacting())


def persistently(do: Callable[[], T], reached: bool = True) -> T:
    """Do it, again after a while where the hub asks for patience (429), is out of order (5xx) or cuts the line.

    ``reached``: whether the hub was reached before, so that a refused connection may pass too; else that is
    raised at once. Raises what the last attempt raised.
    """
    from tenacity import Retrying, stop_after_attempt, wait_exponential

    guard_logs()
    limit_waits()
    growing = wait_exponential(multiplier=1, max=16)

    def wait(state: RetryCallState) -> float:
        asked = _asked_wait(_error_of(state))
        return growing(state) if asked is None else asked

    def again(state: RetryCallState) -> bool:
        error = _error_of(state)
        if error is None or (is_silence(error) and state.attempt_number >= _SILENT_ATTEMPTS):
            return False
        return _may_pass(error, reached)

    def tell(state: RetryCallState) -> None:
        error = _error_of(state)
        assert error is not None, "only an error is waited for"
        status = status_of(error)
        event = f"the hub answered {status}" if status else f"the line to the hub broke ({type(error).__name__})"
        logger.warning("%s: trying again in %.0f s", event, state.upcoming_sleep)

    retrying = Retrying(
        retry=again, wait=wait, stop=stop_after_attempt(ATTEMPTS), before_sleep=tell, sleep=_sleep, reraise=True
    )
    return retrying(do)


@lru_cache
def resolve(repo_id: str, revision: str | None = None, *, repo_type: str = "model") -> ResolvedRevision:
    """The commit that a branch, tag or commit of a repository is: the same for all that one run reads.

    ``cache_clear`` lets it be looked up anew. Offline, or where the hub cannot be reached, it is what the cache
    knows. Raises the hub client's errors.
    """
    from huggingface_hub import HfApi

    return persistently(
        lambda: HfApi().resolve_revision(repo_id, repo_type=repo_type, revision=revision), reached=False
    )


def asked_seconds(retry_after: str) -> float | None:
    """Return the wait that a Retry-After header asks for, by seconds or by a date; None where it is neither."""
    if re.fullmatch(r"\d+(\.\d+)?", retry_after.strip(), re.ASCII):
        return float(retry_after)
    try:
        moment = parsedate_to_datetime(retry_after)
        return max(0.0, moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def reason(error: BaseException) -> str:
    """Why the hub did not do it, and what to do: one line without secrets."""
    for link in _chain(error):
        said = _known(link)
        if said:
            return said
    said = " ".join(str(error).split())[:300]
    return redact(f"{type(error).__name__}: {said}" if said else type(error).__name__).rstrip(".")


def endpoint() -> str:
    """The hub's address, without secrets."""
    from huggingface_hub import constants

    return redact(constants.ENDPOINT)


def is_unreachable(error: BaseException) -> bool:
    """Whether nothing answered at all, or nothing may be asked."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(link, httpx2.TransportError | OfflineModeIsEnabled) for link in _chain(error))


def is_silence(error: BaseException) -> bool:
    """Whether a connection was made and nothing came in the time that it has."""
    import httpx2

    return any(isinstance(link, httpx2.ReadTimeout | httpx2.WriteTimeout) for link in _chain(error))


def is_hub_error(error: BaseException) -> bool:
    """Whether it is the hub, or the way to it, that an error tells of."""
    import httpx2
    from huggingface_hub import errors

    kinds = (
        httpx2.TransportError,
        errors.HfHubHTTPError,
        errors.OfflineModeIsEnabled,
        errors.LocalTokenNotFoundError,
        errors.IncompleteSnapshotError,
    )
    return any(isinstance(link, kinds) for link in _chain(error))


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the hub answered with; None where it did not answer."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((link.response.status_code for link in _chain(error) if isinstance(link, HfHubHTTPError)), None)


def _without_token(found: re.Match[str]) -> str:
    """Return ``Bearer TOKEN`` as it is where TOKEN is a placeholder or a word of the sentence, else without it."""
    token = found["token"]
    if _PLACEHOLDER.fullmatch(token) or (_WORD.fullmatch(token) and not found["head"]):
        return found[0]
    return found[0].removesuffix(token) + HIDDEN


def _without_query(found: re.Match[str]) -> str:
    """Return an address with a hidden query, and the punctuation after it."""
    address = found[0].rstrip(_END)
    return _QUERY.sub(f"?{HIDDEN}", address, count=1) + found[0][len(address) :]


def _own_tokens() -> list[str]:
    """The user's token wherever the hub client would find it, where that is loaded; longest first."""
    found = {os.environ.get(name, "").strip() for name in _VARIABLES}
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import get_token

        found.add((get_token() or "").strip())
    return sorted((secret for secret in found if len(secret) >= 8), key=len, reverse=True)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _may_pass(error: BaseException, reached: bool) -> bool:
    """Whether the same request may succeed a little later."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    for link in _chain(error):
        if isinstance(link, HfHubHTTPError):
            status = link.response.status_code
            return (status == 429 or status >= 500) and (_asked_wait(link) or 0) <= LONGEST_WAIT
        if isinstance(link, httpx2.ConnectError | httpx2.ConnectTimeout):
            return reached
        if isinstance(link, httpx2.ProxyError):
            return False
        if isinstance(link, httpx2.TransportError | json.JSONDecodeError):
            return True
    return False


def _asked_wait(error: BaseException | None) -> float | None:
    """Seconds that the hub asks to wait; None where it names none."""
    response = getattr(error, "response", None)
    return None if response is None else asked_seconds(response.headers.get("Retry-After", ""))


def _known(error: BaseException) -> str:
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return "no token was found; set HF_TOKEN, or log in with: hf auth login"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so only the cache was looked at: unset it, or give a folder"
    if isinstance(error, errors.IncompleteSnapshotError):
        return "the cache holds only a part of it, and the hub cannot be asked; run again with access to the hub"
    if isinstance(error, errors.GatedRepoError):
        return "it is gated; accept its terms on its page on the hub, and set HF_TOKEN to that account's token"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or HF_TOKEN may not see it; check the name and the token"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision; check the branch, tag or commit"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "the repository lacks a file that is needed"
    if isinstance(error, errors.HfHubHTTPError):
        return _by_status(error.response.status_code, error.server_message)
    if isinstance(error, json.JSONDecodeError):
        return "the hub answered with something that is no JSON; check HF_ENDPOINT, or try again later"
    if isinstance(error, httpx2.ReadTimeout | httpx2.WriteTimeout):
        return (
            f"the hub at {endpoint()}, or a proxy on the way, accepts connections and does not answer; "
            "check HF_ENDPOINT and the proxy's address, or run the same command again later"
        )
    if isinstance(error, httpx2.TransportError):
        said = redact(" ".join(str(error).split())) or type(error).__name__
        return f"the hub cannot be reached at {endpoint()} ({said}); check the network and HF_ENDPOINT"
    return ""


def _by_status(status: int, message: str | None) -> str:
    said = redact(" ".join((message or "").split()))[:200].rstrip(".")
    answer = f"the hub answered {status}" + (f" ({said})" if said else "")
    if status == 401:
        return f"{answer}: the token is not valid; set HF_TOKEN to one from the hub's settings page"
    if status == 403:
        return f"{answer}: the token may not do this; give it the rights, or use that of another account"
    if status == 429:
        return f"{answer}: it asks for fewer requests; wait, and run the same command again"
    if status >= 500:
        return f"{answer}, again and again: it is out of order; run the same command again later"
    return answer
