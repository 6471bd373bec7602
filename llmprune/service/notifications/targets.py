"""Targets of notifications: webhooks and e-mail addresses that a user names, checked against the settings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from llmprune.common.errors import RecipeError
from llmprune.common.printing import printable
from llmprune.service.notifications.addresses import literal_address, refusal_of
from llmprune.service.notifications.settings import NotificationSettings

Kind = Literal["webhook", "email"]
MOST_TARGETS = 5  # of one job
MAX_URL = 2_000  # characters
_GONE = "…"  # stands for what is not shown; no URL and no address contains it
_MASK = f"/{_GONE}"  # in place of the path of a URL
_MAX_ADDRESS = 254  # characters, RFC 5321
_ADDRESS = re.compile(
    r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@((?:[a-z0-9-]{1,63}\.)*[a-z0-9-]{1,63})", re.ASCII | re.IGNORECASE
)


@dataclass(frozen=True, order=True)
class Target:
    """Place that is told when a job ends: the URL of a webhook, or an e-mail address."""

    kind: Kind
    target: str

    @property
    def shown(self) -> str:
        """The target for logs and lists: of a URL only the host, because its path may be a secret."""
        return f"{_parts(self.target).hostname}{_MASK}" if self.kind == "webhook" else self._short("")

    @property
    def masked(self) -> str:
        """The target for forms: as ``shown``, with a mark that tells those of one host or domain apart."""
        parts, mark = _parts(self.target), hashlib.sha256(self.target.encode()).hexdigest()[:6]
        return f"{parts.scheme}://{parts.netloc}{_MASK}{mark}" if self.kind == "webhook" else self._short(mark)

    def _short(self, mark: str) -> str:
        """Return an e-mail address with the first letter of its name alone."""
        name, _, domain = self.target.rpartition("@")
        return f"{name[:1]}{_GONE}{mark}@{domain}"


@dataclass(frozen=True)
class StoredTarget:
    """A target as the database has it; see ``notifications/cipher.py``."""

    kind: Kind
    text: str  # encrypted


def checked_targets(
    urls: Iterable[str], emails: Iterable[str], *, settings: NotificationSettings
) -> tuple[Target, ...]:
    """Return the targets of a job without doubles. Raises RecipeError that lists every problem."""
    wanted = [Target("webhook", url.strip()) for url in urls] + [Target("email", email.strip()) for email in emails]
    targets = tuple(dict.fromkeys(target for target in wanted if target.target))
    problems = [problem for target in targets if (problem := problem_of(target, settings=settings))]
    if len(targets) > MOST_TARGETS:
        problems.append(f"notify: {len(targets)} targets are given and {MOST_TARGETS} are allowed; remove some")
    if problems:
        raise RecipeError(problems, "submission")
    return targets


def unmasked(kind: Kind, lines: Iterable[str], *, saved: Iterable[Target]) -> list[str]:
    """Return the targets of a form, with the saved ones in place of their masked forms. Raises RecipeError."""
    known, found = {target.masked: target.target for target in saved if target.kind == kind}, []
    key, whole = ("notify_url", "URL") if kind == "webhook" else ("notify_email", "address")
    for line in lines:
        if _GONE in line and line not in known:
            raise RecipeError(f"{key} {printable(line[:100])!r}: it is not saved any more; give the whole {whole}")
        found.append(known.get(line, line))
    return found


def problem_of(target: Target, *, settings: NotificationSettings) -> str | None:
    """Return why a target is not allowed, with the remedy; None where it is."""
    if target.kind == "email":
        return _problem_of_address(target.target, settings)
    return _problem_of_url(target.target, settings)


def split_lines(text: str) -> list[str]:
    """Return the entries of a form's field, which are separated by spaces, commas or lines."""
    return [part for part in re.split(r"[\s,]+", text) if part]


def host_is_listed(url: SplitResult, hosts: Sequence[str]) -> bool:
    """Return whether the operator allows a URL's host, with any port or with this one."""
    host = (url.hostname or "").lower()
    return host in hosts or f"{host}:{port_of(url)}" in hosts


def port_of(url: SplitResult) -> int:
    """Return the port of a URL. Raises ValueError where it is none."""
    return url.port or (443 if url.scheme == "https" else 80)


def _problem_of_url(text: str, settings: NotificationSettings) -> str | None:
    shown = printable(text[:100])
    if settings.webhooks == "off":
        return "notify_url: this service calls no webhooks; leave it out"
    if len(text) > MAX_URL or not re.fullmatch(r"[!-~]+", text):
        return f"notify_url {shown!r}: give a URL of at most {MAX_URL:,} characters without spaces"
    url = _parts(text)
    try:
        port_of(url)
    except ValueError:
        return f"notify_url {shown!r}: its port is no number from 1 to 65535"
    if url.scheme not in ("https", "http") or not url.hostname:
        return f"notify_url {shown!r}: give a URL such as https://example.org/hook"
    if url.username is not None or url.password is not None:
        return "notify_url: it has a user name; give a URL without one, the signature proves who sends"
    if host_is_listed(url, settings.webhook_hosts):
        return None
    if settings.webhooks == "listed":
        hosts = ", ".join(settings.webhook_hosts) or "none"
        return f"notify_url: the host {url.hostname} is not allowed here; the operator allows: {hosts}"
    if url.scheme != "https":
        return f"notify_url: {url.hostname} is called by http; give an https URL"
    address = literal_address(url.hostname)
    refused = refusal_of(address) if address is not None else None
    return f"notify_url: {refused}; give a public address" if refused else None


def _problem_of_address(text: str, settings: NotificationSettings) -> str | None:
    shown = printable(text[:100])
    if settings.smtp is None:
        return "notify_email: this service has no mail server; use a webhook, or ask the operator for serve --smtp"
    found = _ADDRESS.fullmatch(text) if len(text) <= _MAX_ADDRESS else None
    if found is None:
        return f"notify_email {shown!r}: give an address such as ann@example.org"
    if found[1].lower() not in settings.mail_domains:
        return f"notify_email {shown!r}: this service writes only to addresses at {', '.join(settings.mail_domains)}"
    return None


def _parts(url: str) -> SplitResult:
    """Split a URL; return empty parts where it is not valid."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
