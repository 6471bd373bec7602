"""Pages on a phone, for everybody who may read them, and the sign-in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import PHONE, faults_of_access, overflow, quiet_page
from helpers.openid_provider import openid_provider
from helpers.service import recipe, served
from playwright.sync_api import Browser, expect

from llmprune.service.client.sync.client import Client
from llmprune.service.database.open_database import open_database
from llmprune.service.oidc.settings import OidcSettings
from llmprune.service.settings import Settings
from llmprune.service.users.tokens import Tokens


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_on_a_phone(
    browser: Browser, live: tuple[Client, Settings], pruned: str, scheme: Any
) -> None:
    """At 390 pixels no page scrolls sideways, and axe finds no fault, in light and dark colours."""
    failed = live[0].submit(recipe(exit=1), name="a-name-without-a-single-space-that-is-much-longer-than-a-phone").id
    assert live[0].job(failed).wait().state == "failed"
    context = browser.new_context(base_url=live[0].server, viewport=PHONE, color_scheme=scheme)
    for page in quiet_page(context, live[0].server):
        for path in (
            "/",
            "/?search=nothing",
            "/submit",
            f"/jobs/{pruned}",
            f"/jobs/{failed}",
            f"/compare?job={pruned}",
            "/models",
            "/models/upload",
            "/sweep",
        ):
            page.goto(path)
            assert (path, overflow(page), faults_of_access(page)) == (path, 0, [])
    context.close()


def test_sign_in_and_out(browser: Browser, tmp_path: Path) -> None:
    """With tokens a person signs in with one; a wrong one is refused, and signing out ends access."""
    with served(tmp_path) as (client, settings):
        context = browser.new_context(base_url=client.server, viewport=PHONE)
        page = context.new_page()
        page.goto("/")
        expect(page.get_by_text("Write the first recipe")).to_be_visible()
        token = Tokens(open_database(settings)).create("ann", "user")
        page.goto("/models")
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert (overflow(page), faults_of_access(page)) == (0, [])
        page.get_by_label("Token").fill("llmprune_wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("no such token")
        page.get_by_label("Token").fill(token)
        page.keyboard.press("Enter")
        expect(page).to_have_title(re.compile("Models"))
        expect(page.get_by_text("ann", exact=True)).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        page.goto("/")
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        context.close()


def test_sign_in_at_a_provider(browser: Browser, tmp_path: Path) -> None:
    """A person comes back from another site signed in, makes a token, and sees users and audit log as an admin."""
    (tmp_path / "secret").write_text("s")
    with openid_provider() as provider:
        settings = OidcSettings(
            issuer=provider.issuer.replace("127.0.0.1", "localhost"),  # another site for the browser
            client_id="llmprune",
            secret_file=tmp_path / "secret",
            roles=(("ops", "admin"),),
        )
        provider.person("ann-1", preferred_username="ann", groups=["ops"])
        with served(tmp_path, oidc=settings) as (client, _):
            context = browser.new_context(base_url=client.server, viewport=PHONE)
            page = context.new_page()
            page.goto("/account")
            assert (overflow(page), faults_of_access(page)) == (0, [])
            page.get_by_role("link", name="Sign in at localhost").click()
            page.locator("input[name=sub]").fill("ann-1")
            page.keyboard.press("Enter")
            expect(page.get_by_role("heading", name="What I use of what I may")).to_be_visible()
            page.get_by_text("Make a token").click()
            page.get_by_label("Name").fill("laptop")
            page.get_by_role("button", name="Make the token").click()
            expect(page.get_by_role("status")).to_contain_text("Copy it now")
            assert (overflow(page), faults_of_access(page)) == (0, [])
            for path in ("/users", "/users/ann", "/users/ann/delete", "/audit"):
                page.goto(path)
                assert (path, overflow(page), faults_of_access(page)) == (path, 0, [])
            context.close()
