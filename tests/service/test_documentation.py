"""The documentation at ``/docs``: who may read it, what it answers, and what a page may load."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.service import ServiceHarness, served

from llmprune.service.settings import SITE
from llmprune.service.users.tokens import Tokens

HTML = {"Accept": "text/html"}
CHROMIUM = shutil.which("chromium")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A built site of two files, with a file outside it."""
    folder = tmp_path / "site"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<h1>Start here</h1>", encoding="utf-8")
    (folder / "assets" / "style.css").write_text("h1 {}", encoding="utf-8")
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    return folder


def test_a_built_site_is_served(tmp_path: Path, site: Path) -> None:
    """``/docs`` leads to the first page; files have their types; a page may load only what the service has."""
    http = ServiceHarness(tmp_path, documentation=site).http
    answer = http.get("/docs", headers=HTML)
    assert (answer.url.path, answer.text) == ("/docs/index.html", "<h1>Start here</h1>")
    policy = answer.headers["content-security-policy"]
    assert "script-src 'self'; " in policy
    assert "img-src 'self' data:; " in policy
    assert "http" not in policy
    assert http.get("/docs/assets/style.css").headers["content-type"].startswith("text/css")


@pytest.mark.parametrize(
    "path", ["/docs/none.html", "/docs/assets", "/docs/%2e%2e/secret.txt", "/docs/..%2fsecret.txt"]
)
def test_what_is_not_in_the_site_is_not_found(tmp_path: Path, site: Path, path: str) -> None:
    """A missing page, a folder and a path out of the site answer 404."""
    answer = ServiceHarness(tmp_path, documentation=site).http.get(path)
    assert answer.status_code == 404
    assert "secret" not in answer.text.replace("secret.txt", "")


def test_a_checkout_without_a_site_explains_how_to_build_it(tmp_path: Path) -> None:
    """Without a built site the page names the command; a page of the site is missing."""
    http = ServiceHarness(tmp_path, documentation=tmp_path / "none").http
    answer = http.get("/docs", headers=HTML)
    assert answer.status_code == 404
    assert "<pre>make docs</pre>" in answer.text
    assert http.get("/docs/index.html").status_code == 404


def test_the_documentation_asks_for_a_token_as_every_page_does(tmp_path: Path, site: Path) -> None:
    """Once a token exists, a person is led to the sign-in and a program is refused."""
    harness = ServiceHarness(tmp_path, documentation=site)
    service_tokens: Tokens = harness.service.tokens
    token = service_tokens.create("ann", "user")
    assert harness.http.get("/docs/index.html").status_code == 401
    assert harness.http.get("/docs/index.html", headers=HTML).url.path == "/login"
    allowed = {"Authorization": f"Bearer {token}"}
    assert harness.http.get("/docs/index.html", headers=allowed).status_code == 200


def test_every_page_links_to_the_documentation(tmp_path: Path) -> None:
    """The header of the pages has the link."""
    assert '<a href="/docs">Docs</a>' in ServiceHarness(tmp_path).http.get("/", headers=HTML).text


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
@pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="the documentation is not built: make docs")
def test_the_built_site_works_under_its_policy(tmp_path: Path) -> None:
    """In a browser the search finds a page, and nothing breaks the policy or comes from another host."""
    playwright = pytest.importorskip("playwright.sync_api")
    with served(tmp_path) as (client, _), playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda asked: asked.url.startswith(client.server) or said.append(asked.url))
        page.goto(f"{client.server}/docs")
        page.get_by_placeholder("Search").click()
        page.keyboard.type("keep_pattern")
        page.locator(".md-search-result__link", has_text="keep_pattern").first.click()
        page.wait_for_url("**/reference/recipe.html*")
        browser.close()
    assert said == []
