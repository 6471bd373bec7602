"""Explanations of the hub client's errors: one sentence with the cause and the remedy, without secrets."""

from __future__ import annotations

import json

from llmprune.common.hub.errors import chain_of
from llmprune.common.hub.secrets import redact


def explain(error: BaseException) -> str:
    """Explain why a request to the hub failed and what to do about it, in one line without secrets."""
    for link in chain_of(error):
        explanation = _known(link)
        if explanation:
            return explanation
    message = " ".join(str(error).split())[:300]
    return redact(f"{type(error).__name__}: {message}" if message else type(error).__name__).rstrip(".")


def endpoint() -> str:
    """Return the hub's address without secrets."""
    from huggingface_hub import constants

    return redact(constants.ENDPOINT)


def _known(error: BaseException) -> str:
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return "no token was found; set HF_TOKEN, or log in with: hf auth login"
    if isinstance(error, errors.HFValidationError):
        return "it is no hub id: that is org/name, of at most 96 letters, digits, -, _ and ., without a revision"
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
        message = redact(" ".join(str(error).split())) or type(error).__name__
        return f"the hub cannot be reached at {endpoint()} ({message}); check the network and HF_ENDPOINT"
    return ""


def _by_status(status: int, server_message: str | None) -> str:
    message = redact(" ".join((server_message or "").split()))[:200].rstrip(".")
    answer = f"the hub answered {status}" + (f" ({message})" if message else "")
    if status == 401:
        return f"{answer}: the token is not valid; set HF_TOKEN to one from the hub's settings page"
    if status == 403:
        return f"{answer}: the token may not do this; give it the rights, or use that of another account"
    if status == 429:
        return f"{answer}: it asks for fewer requests; wait, and run the same command again"
    if status >= 500:
        return f"{answer}, again and again: it is out of order; run the same command again later"
    return answer
