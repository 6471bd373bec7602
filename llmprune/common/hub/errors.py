"""Kinds of errors of the hub client, found in the whole chain of causes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import UTC
from email.utils import parsedate_to_datetime


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it, latest first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def is_unreachable(error: BaseException) -> bool:
    """Check whether the request got no answer, or offline mode forbade it."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(link, httpx2.TransportError | OfflineModeIsEnabled) for link in chain_of(error))


def is_silence(error: BaseException) -> bool:
    """Check whether a connection was made and timed out without an answer."""
    import httpx2

    return any(isinstance(link, httpx2.ReadTimeout | httpx2.WriteTimeout) for link in chain_of(error))


def is_hub_error(error: BaseException) -> bool:
    """Check whether an error comes from the hub, its client or the network between them."""
    import httpx2
    from huggingface_hub import errors

    kinds = (
        httpx2.TransportError,
        errors.HfHubHTTPError,
        errors.OfflineModeIsEnabled,
        errors.LocalTokenNotFoundError,
        errors.IncompleteSnapshotError,
    )
    return any(isinstance(link, kinds) for link in chain_of(error))


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the hub's answer; None where it did not answer."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((link.response.status_code for link in chain_of(error) if isinstance(link, HfHubHTTPError)), None)


def retry_after_seconds(retry_after: str) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or a date; None where it is neither."""
    if re.fullmatch(r"\d+(\.\d+)?", retry_after.strip(), re.ASCII):
        return float(retry_after)
    try:
        moment = parsedate_to_datetime(retry_after)
        return max(0.0, moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
