"""E-mail through the operator's mail server."""

from __future__ import annotations

import smtplib
import ssl
from collections.abc import Mapping
from email.message import EmailMessage
from email.utils import formatdate
from typing import Any
from urllib.parse import unquote, urlsplit

from llmprune.common.printing import printable
from llmprune.results.formatting import change, duration, percent
from llmprune.service.notifications.settings import NotificationSettings
from llmprune.service.notifications.targets import Target, problem_of
from llmprune.service.notifications.webhook import DeliveryError

PORTS = {"smtp": 587, "smtps": 465, "smtp+plain": 25}
_TIMEOUT = 20.0  # seconds
_PERMANENT = 500  # replies from here on are final, RFC 5321
_MAX_ERROR = 2_000  # characters


def send_mail(address: str, message: str, *, body: Mapping[str, Any], settings: NotificationSettings) -> None:
    """Send the e-mail of a notification. ``message``: its id. Raises DeliveryError."""
    problem = problem_of(Target("email", address), settings=settings)
    shown = Target("email", address).shown
    if problem:
        raise DeliveryError(problem.replace(address, shown), permanent=True)
    mail = composed(address, message, body=body, settings=settings)
    try:
        with _connected(settings) as server:
            server.send_message(mail)
    except smtplib.SMTPRecipientsRefused as error:
        codes = [code for code, _ in error.recipients.values()]
        raise DeliveryError(f"the mail server refused the address ({codes[0]})", min(codes) >= _PERMANENT) from error
    except smtplib.SMTPNotSupportedError as error:
        raise DeliveryError("the mail server offers no STARTTLS; use smtps:// or smtp+plain://") from error
    except (smtplib.SMTPException, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {printable(str(error)).replace(address, shown)[:200]}"
        raise DeliveryError(f"the mail server does not take it: {reason}") from error


def composed(address: str, message: str, *, body: Mapping[str, Any], settings: NotificationSettings) -> EmailMessage:
    """Return the e-mail of a notification."""
    assert settings.mail_from is not None, "required with --smtp"
    mail = EmailMessage()
    mail["From"], mail["To"] = settings.mail_from, address
    mail["Date"], mail["Message-ID"] = formatdate(), f"<{message}@{settings.mail_from.rpartition('@')[2]}>"
    mail["Auto-Submitted"] = "auto-generated"
    data = body["data"]
    if body["type"] == "test":
        mail["Subject"] = "llmprune: test"
        mail.set_content("Jobs of llmprune will tell you here when they end.\n")
        return mail
    state = str(data["state"]).replace("_", " ")
    mail["Subject"] = printable(f"llmprune: {data['name']}: {state}")
    mail.set_content("\n".join(_lines(data, state)) + "\n")
    return mail


def _lines(data: Mapping[str, Any], state: str) -> list[str]:
    """Return the lines of an e-mail about a job that has ended."""
    lines = [
        f"{printable(data['name'])} is {state}.",
        "",
        f"Job: {data['id']}",
        f"Model: {printable(data['model'])}",
        f"Ran: {duration(data['ran_seconds'])}",
    ]
    figures = data.get("figures")
    if figures:
        lines.append(f"Size: {change(*figures['bytes'])}")
        if figures.get("retention") is not None:
            lines.append(f"Retention: {percent(float(figures['retention']))}")
        if figures.get("perplexity"):
            dense, pruned = figures["perplexity"]
            lines.append(f"Perplexity: {dense} → {pruned}")
    if data.get("error"):
        lines += ["", printable(data["error"][:_MAX_ERROR], newlines=True)]
    if data.get("url"):
        lines += ["", data["url"]]
    return lines


def _connected(settings: NotificationSettings) -> smtplib.SMTP:
    """Return a connection to the mail server, encrypted unless the URL says otherwise, and signed in."""
    assert settings.smtp is not None, "checked by problem_of"
    url = urlsplit(settings.smtp)
    host, port = url.hostname or "", url.port or PORTS[url.scheme]
    context = ssl.create_default_context()
    if url.scheme == "smtps":
        server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=_TIMEOUT, context=context)
    else:
        server = smtplib.SMTP(host, port, timeout=_TIMEOUT)
    try:
        if url.scheme == "smtp":
            server.starttls(context=context)
        if url.username and settings.smtp_password_file is not None:
            password = settings.smtp_password_file.read_text(encoding="utf-8").strip()
            server.login(unquote(url.username), password)
    except BaseException:
        server.close()
        raise
    return server
