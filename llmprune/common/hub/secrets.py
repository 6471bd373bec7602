"""Removal of secrets from text: tokens, user names in addresses, and the signatures of upload links."""

from __future__ import annotations

import logging
import os
import re
import sys

from llmprune.common.hub.errors import chain_of
from llmprune.common.printing import printable

HIDDEN = "***"

_TOKEN = re.compile(r"\bhf_(?:[a-z]+_)?[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}")
_BEARER = re.compile(
    r"(?P<head>\bAuthorization\W{1,5})?\bBearer +(?P<token>[\w~+/=-]+(?:\.[\w~+/=-]+)*)", re.IGNORECASE
)
_PLACEHOLDER = re.compile(r"[A-Z]{1,15}|[A-Z]+(?:_[A-Z]+)+")  # TOKEN, HF_TOKEN: the name of a secret
_WORD = re.compile(r"[A-Z]?[a-z]{1,14}")  # an ordinary word in a sentence about bearer tokens
_USER = re.compile(r"(?<=://)(?<!\bhub://)[^/\s@]+@")  # hub://NAME@REVISION has no user
_ADDRESS = re.compile(r"https?://[^\s'\"<>]+")  # matched whole, which keeps the work linear in the length of the text
_QUERY = re.compile(r"\?[^)]+")
_PUNCTUATION = ".,;:!?"  # of the sentence around an address
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "HF_HUB_TOKEN")
_LOGGERS = ("huggingface_hub", "transformers", "datasets", "llmprune")


def redact(text: str) -> str:
    """Return the text without tokens, user names in addresses, and queries of addresses, which sign upload links."""
    for secret in _own_tokens():
        text = text.replace(secret, HIDDEN)
    text = _BEARER.sub(_without_token, _TOKEN.sub(HIDDEN, text))
    return _ADDRESS.sub(_without_query, _USER.sub(f"{HIDDEN}@", text))


def has_token(text: str) -> bool:
    """Check whether a text contains the user's own token or something of the form of a token."""
    bearers = any(_without_token(found) != found[0] for found in _BEARER.finditer(text))
    return bearers or bool(_TOKEN.search(text)) or any(secret in text for secret in _own_tokens())


def redact_error(error: BaseException) -> None:
    """Redact an error and all its causes in place: a traceback prints the whole chain."""
    for link in chain_of(error):
        link.args = tuple(redact(part) if isinstance(part, str) else part for part in link.args)
        if isinstance(getattr(link, "server_message", None), str):
            link.server_message = redact(link.server_message)  # type: ignore[attr-defined]


class _RedactingFilter(logging.Filter):
    """Removes secrets and control characters from a message, which becomes one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(redact(record.getMessage())), None
        return True


def redact_logs() -> None:
    """Redact the logs of llmprune and of the hub's libraries: the hub client logs signed addresses when it retries."""
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(kind, _RedactingFilter) for kind in handler.filters):
                handler.addFilter(_RedactingFilter())


def _without_token(found: re.Match[str]) -> str:
    """Hide the token of ``Bearer TOKEN``, unless TOKEN is a placeholder or an ordinary word."""
    token = found["token"]
    if _PLACEHOLDER.fullmatch(token) or (_WORD.fullmatch(token) and not found["head"]):
        return found[0]
    return found[0].removesuffix(token) + HIDDEN


def _without_query(found: re.Match[str]) -> str:
    """Hide the query of an address and keep the punctuation that follows it."""
    address = found[0].rstrip(_PUNCTUATION)
    return _QUERY.sub(f"?{HIDDEN}", address, count=1) + found[0][len(address) :]


def _own_tokens() -> list[str]:
    """Return the user's tokens, longest first: from the environment, and from the hub client if it is imported."""
    found = {os.environ.get(name, "").strip() for name in _VARIABLES}
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import get_token

        found.add((get_token() or "").strip())
    return sorted((secret for secret in found if len(secret) >= 8), key=len, reverse=True)
