"""A running service and one Chromium for all tests of its pages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, MINUTE, QUICKSTART, WIDE, quiet_page
from helpers.service import recipe, served
from playwright.sync_api import Browser, Page, expect, sync_playwright

from llmprune.service.client.sync.client import Client
from llmprune.service.settings import Settings

TASKS = Path(__file__).parents[3] / "eval" / "tasks"
EITHER = (sys.executable, str(Path(__file__).parents[2] / "helpers" / "either_run.py"))


@pytest.fixture(scope="package", autouse=True)
def _chromium() -> None:
    """Skip all tests where there is no Chromium."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Settings]]:
    """A running service whose jobs may name a tiny model and a text."""
    root = tmp_path_factory.mktemp("browser")
    if not QUICKSTART:
        from helpers.commands import save_model, write_text

        save_model(root / "models" / "tiny")
        write_text(root / "models" / "text.txt")
    (root / "models").mkdir(exist_ok=True)
    with served(root, command=EITHER, allow_roots=(root / "models",), allow_tasks=(TASKS,)) as running:
        yield running


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests."""
    expect.set_options(timeout=MINUTE / 2)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, live: tuple[Client, Settings]) -> Iterator[Page]:
    """A window that must have no error on its console, no breach of its policy and no request to another host."""
    context = browser.new_context(base_url=live[0].server, viewport=WIDE)
    yield from quiet_page(context, live[0].server)
    context.close()


@pytest.fixture(scope="package")
def pruned(live: tuple[Client, Settings]) -> str:
    """A finished job."""
    job: str = live[0].submit(recipe(name="looked-at"), name="looked at").id
    assert live[0].job(job).wait().state == "succeeded"
    return job
