"""Options of ``llmprune serve`` for notifications, checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmprune.common.errors import RecipeError

if TYPE_CHECKING:
    from llmprune.service.notifications.settings import NotificationSettings

Webhooks = Annotated[
    Literal["public", "listed", "off"],
    typer.Option(
        help="Hosts that webhooks of jobs may call: public addresses by https, only those of --webhook-host, or none."
    ),
]
WebhookHost = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST[:PORT]", help="Host that webhooks may call by http and at a private address; may be repeated."
    ),
]
Smtp = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Mail server for e-mail when jobs end: smtp://USER@HOST:587 (STARTTLS), smtps://USER@HOST:465, or "
        "smtp+plain://HOST:25 without encryption.",
    ),
]
SmtpPasswordFile = Annotated[Path | None, typer.Option(help="File with the password of the user in --smtp.")]
MailFrom = Annotated[str | None, typer.Option(metavar="ADDRESS", help="Sender of the e-mail; needed with --smtp.")]
MailDomain = Annotated[
    list[str] | None,
    typer.Option(metavar="DOMAIN", help="Domain that e-mail may go to; may be repeated. Default: that of --mail-from."),
]
PublicUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Address at which people reach the service, for links in notifications."),
]


def notification_settings(**options: Any) -> NotificationSettings:
    """Return the settings of the options. Raises RecipeError where one is wrong."""
    from urllib.parse import urlsplit

    from llmprune.service.notifications.mail import PORTS
    from llmprune.service.notifications.settings import NotificationSettings

    given = {name: value for name, value in options.items() if value is not None}
    smtp, sender, password_file = (given.get(name) for name in ("smtp", "mail_from", "smtp_password_file"))
    if smtp is not None:
        try:
            url = urlsplit(smtp)
            is_url = url.scheme in PORTS and bool(url.hostname) and (url.port is None or url.port > 0)
        except ValueError:
            is_url = False
        if not is_url or url.path.strip("/") or url.query:
            raise RecipeError("--smtp: give a URL such as smtp://user@mail.example.org:587")
        if url.password is not None:
            raise RecipeError("--smtp: other users of the machine can see its password; use --smtp-password-file")
        if url.username and url.scheme == "smtp+plain":
            raise RecipeError("--smtp: a password is not sent without encryption; use smtp:// or smtps://")
        if url.username and password_file is None:
            raise RecipeError("--smtp: it names a user; give the password with --smtp-password-file")
        if sender is None or "@" not in sender.strip("@"):
            raise RecipeError("--smtp needs --mail-from, the address of the sender, such as llmprune@example.org")
        given["mail_domains"] = _domains(given.get("mail_domains") or [sender.rpartition("@")[2]])
    if password_file is not None:
        _require_readable(password_file)
        given["smtp_password_file"] = password_file.absolute()
    if "webhook_hosts" in given:
        given["webhook_hosts"] = tuple(host.lower() for host in given["webhook_hosts"])
    public = given.get("public_url")
    if public is not None and not public.startswith(("http://", "https://")):
        raise RecipeError(f"--public-url {public!r}: give a URL such as https://pruner.example.org")
    return NotificationSettings(**given)


def _domains(domains: Sequence[str]) -> tuple[str, ...]:
    return tuple(domain.lower().lstrip("@") for domain in domains)


def _require_readable(path: Path) -> None:
    try:
        empty = not path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise RecipeError(f"--smtp-password-file {path}: it cannot be read ({error})") from error
    if empty:
        raise RecipeError(f"--smtp-password-file {path}: it is empty")
