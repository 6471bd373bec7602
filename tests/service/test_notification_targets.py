"""Targets of notifications: which addresses may be called, and what serve is told about them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.receivers import Hooks, hook_server

from llmprune.common.errors import RecipeError
from llmprune.service.cli.notification_options import notification_settings
from llmprune.service.notifications import webhook
from llmprune.service.notifications.addresses import refusal_of
from llmprune.service.notifications.mail import send_mail
from llmprune.service.notifications.settings import NotificationSettings
from llmprune.service.notifications.targets import Target, problem_of
from llmprune.service.notifications.webhook import DeliveryError


@pytest.fixture(scope="module")
def server() -> Iterator[Hooks]:
    """An HTTP server on this machine."""
    with hook_server() as running:
        yield running


@pytest.fixture
def hooks(server: Hooks) -> Hooks:
    """The server, which got nothing yet."""
    server.got.clear()
    return server


PRIVATE = (
    "127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1", "fe80::1", "fc00::1",
    "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1",
)  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_no_private_address_is_public(address: str) -> None:
    """Neither in IPv4, IPv6, nor one within the other."""
    assert refusal_of(ipaddress.ip_address(address))
    assert refusal_of(ipaddress.ip_address("93.184.216.34")) is None
    host = f"[{address}]" if ":" in address else address
    assert problem_of(Target("webhook", f"https://{host}/"), settings=NotificationSettings())


@pytest.mark.parametrize(
    "url",
    ["https://0x7f.1/", "https://2130706433/", "https://017700000001/", "http://example.org/", "ftp://example.org/",
     "https://user:pw@example.org/", "https://example.org:99999/", "https:///x", "https://a b/", "javascript:1",
     "https://[::1", f"https://example.org/{'x' * 2000}"],
)  # fmt: skip
def test_a_wrong_url_is_refused_with_the_remedy(url: str) -> None:
    """Other notations of loopback, plain http, other schemes, passwords, and what is no URL."""
    assert problem_of(Target("webhook", url), settings=NotificationSettings())
    assert problem_of(Target("webhook", "https://example.org:8443/x"), settings=NotificationSettings()) is None


def test_a_name_that_changes_its_address_is_called_at_the_checked_one(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is resolved once; one private address among several refuses it, and the answer names none of them."""
    loopback, public = ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("93.184.216.34")
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[Any]:
        asked.append(host)
        return [public, loopback]

    monkeypatch.setattr(webhook, "resolved", resolve)
    with pytest.raises(DeliveryError, match="no public address") as refused:
        webhook.post(f"https://rebinding.example:{hooks.port}/", b"", headers={}, settings=NotificationSettings())
    assert "127" not in str(refused.value)
    assert (asked, hooks.got) == (["rebinding.example"], [])
    monkeypatch.setattr(webhook, "resolved", lambda host, port: [loopback])
    listed = NotificationSettings(webhooks="listed", webhook_hosts=(f"inner.example:{hooks.port}",))
    webhook.post(f"http://inner.example:{hooks.port}/", b"{}", headers={}, settings=listed)
    assert hooks.got[0][1]["host"] == f"inner.example:{hooks.port}"
    assert problem_of(Target("webhook", "http://inner.example:1/"), settings=listed)


def test_a_slow_receiver_is_left(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole exchange has a limit, however often the receiver sends a byte."""
    monkeypatch.setattr(webhook, "_DEADLINE", 0.1)
    monkeypatch.setattr(hooks, "pause", 0.4)
    settings = NotificationSettings(webhook_hosts=("127.0.0.1",))
    with pytest.raises(DeliveryError, match="it took too long"):
        webhook.post(f"http://127.0.0.1:{hooks.port}/", b"{}", headers={}, settings=settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"smtp": "mail.example.org"}, "give a URL"), ({"smtp": "smtp://x:99999"}, "give a URL"),
        ({"smtp": "smtp://ann:pw@x", "mail_from": "a@b.c"}, "--smtp-password-file"),
        ({"smtp": "smtp://ann@x", "mail_from": "a@b.c"}, "--smtp-password-file"),
        ({"smtp": "smtp+plain://ann@x", "mail_from": "a@b.c"}, "without encryption"),
        ({"smtp": "smtps://x"}, "--mail-from"), ({"public_url": "pruner"}, "--public-url"),
        ({"smtp": "smtps://x", "mail_from": "a@b.c", "smtp_password_file": Path("/nowhere")}, "cannot be read"),
    ],
)  # fmt: skip
def test_wrong_options_of_serve_are_refused(options: dict[str, Any], words: str) -> None:
    """With the remedy, before the service starts."""
    with pytest.raises(RecipeError, match=words):
        notification_settings(**options)
    right = notification_settings(
        smtp="smtps://mail.example.org", mail_from="pruner@Example.org", webhook_hosts=["A:1"]
    )
    assert (right.mail_domains, right.webhook_hosts) == (("example.org",), ("a:1",))


def test_errors_of_mail_name_no_address() -> None:
    """They are stored: of an address that is not allowed any more only the first letter is said."""
    moved = NotificationSettings(smtp="smtp+plain://127.0.0.1:9", mail_from="a@b.c", mail_domains=("other.org",))
    with pytest.raises(DeliveryError, match=r"notify_email 'A…@example\.org': this service writes only to") as refused:
        send_mail("Ann.Other@example.org", "msg", body={}, settings=moved)
    assert refused.value.permanent
