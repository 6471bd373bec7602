"""The pages of a real ``llmprune serve`` in a real Chromium.

Skipped where there is no Chromium. With LLMPRUNE_BROWSER_QUICKSTART=1 the form's own recipe runs, on the demo model,
instead of the same form filled in for a tiny one.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import (
    CHROMIUM,
    FOCUSED,
    MINUTE,
    PHONE,
    WIDE,
    faults_of_access,
    new_job,
    overflow,
    quiet_page,
    tab_to,
    write_recipe,
)
from helpers.finished import write_run
from helpers.openid_provider import openid_provider
from helpers.service import recipe, served
from playwright.sync_api import Browser, Page, expect, sync_playwright

from llmprune.service.client.sync.client import Client
from llmprune.service.jobs.open_database import open_database
from llmprune.service.jobs.tokens import Tokens
from llmprune.service.oidc.settings import OidcSettings
from llmprune.service.settings import Settings
from llmprune.service.supervisor.processes import processes_of_job
from llmprune.service.web.render import static_file

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")


QUICKSTART = os.environ.get("LLMPRUNE_BROWSER_QUICKSTART") == "1"


TASKS = Path(__file__).parents[2] / "eval" / "tasks"
EITHER = (sys.executable, str(Path(__file__).parents[1] / "helpers" / "either_run.py"))


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


def fill_in(page: Page) -> None:
    """Fill in the form for the tiny model; the quickstart keeps the other initial answers."""
    if not QUICKSTART:
        page.get_by_role("button", name="tiny", exact=True).click()
        page.get_by_label("My own text").check()
        page.get_by_label("Data set").fill("text.txt")
        expect(page.locator("#recipe")).to_have_value(re.compile("text.txt"))
    page.get_by_text("More: layers and widths").click()
    page.get_by_label("Choose layers and widths").check()
    page.get_by_label("Layers to remove").fill("2" if QUICKSTART else "1")
    if not QUICKSTART:
        page.get_by_label("Windows").fill("4")
        page.get_by_label("Tokens per window").fill("32")
        page.get_by_label("Perplexity on split").fill("")


@pytest.fixture(scope="module")
def pruned(live: tuple[Client, Settings]) -> str:
    """A finished job."""
    job: str = live[0].submit(recipe(name="looked-at"), name="looked at").id
    assert live[0].job(job).wait().state == "succeeded"
    return job


def test_submit_by_the_form_watch_it_finish_and_open_the_report(page: Page) -> None:
    """A person clicks from the first page to the report; recipe, plan and progress are shown live."""
    page.goto("/")
    page.get_by_role("link", name="New job").click()
    fill_in(page)
    expect(page.locator("#recipe")).to_have_value(re.compile(f"remove: {2 if QUICKSTART else 1}\n"))
    expect(page.locator("#outcome")).to_contain_text("Parameters", timeout=2 * MINUTE)
    page.get_by_label("Layers to remove").fill("9999")
    expect(page.get_by_role("alert")).to_contain_text("depth.remove")
    page.get_by_label("Layers to remove").fill("2")
    expect(page.locator("#outcome tr", has_text="Layers")).to_contain_text("−", timeout=MINUTE)
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#live .state")).to_have_text("running", timeout=MINUTE)
    # the passes over a tiny model may end between two refreshes; the verification takes longer
    steps = re.compile("Score|Cut and repair|Save|Verify|Evaluate")
    expect(page.locator("#live")).to_contain_text(steps, timeout=5 * MINUTE)
    expect(page.locator("#live .state")).to_have_text("succeeded", timeout=(15 if QUICKSTART else 3) * MINUTE)
    report = page.frame_locator("iframe.report")
    expect(report.get_by_role("heading", level=1)).to_contain_text("pruned")
    assert page.locator("iframe.report").evaluate("frame => frame.clientHeight") > WIDE["height"]
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name=re.compile("Copied|Selected"))).to_be_visible()
    page.get_by_role("link", name="Open the report page").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("pruned")


def test_the_list_is_refreshed_in_place(page: Page, live: tuple[Client, Settings]) -> None:
    """The row of a running job changes in the table, and its contents appear nowhere else on the page."""
    job = live[0].submit(recipe(layers=4, pause=1), name="in the list").id
    page.goto("/")
    expect(page.locator(f"#job-{job}")).to_contain_text(re.compile("layer [2-4] of 4"))
    assert page.get_by_role("link", name="in the list").count() == 1
    expect(page.locator(f"#job-{job}")).to_contain_text("succeeded")


def test_compare_two_runs(page: Page, live: tuple[Client, Settings], pruned: str) -> None:
    """Two ticked jobs are in the chart and in the table of the comparison."""
    other = live[0].submit(recipe(name="other"), name="the other").id
    assert live[0].job(other).wait().state == "succeeded"
    page.goto("/")
    for name in ("looked at", "the other"):
        page.get_by_label(f"Compare {name}").check()
    page.get_by_role("button", name="Compare").click()
    expect(page).to_have_title(re.compile("Compare"))
    expect(page.get_by_role("img", name="Size against")).to_be_visible()
    table = page.get_by_role("table")
    for name in ("looked at", "the other"):
        expect(table.get_by_role("row").filter(has_text=name)).to_contain_text("−40.0%")
    assert {pruned, other} == set(re.findall(r"job=(\w+)", page.url))


def test_one_more_task_and_the_download_by_keyboard(page: Page, pruned: str) -> None:
    """What was kept comes first; a task of this machine is ticked and sent, and the model downloaded, by keyboard."""
    page.goto(f"/jobs/{pruned}")
    headings = page.get_by_role("heading", level=2).all_inner_texts()
    assert headings[:2] == ["What it kept", "What next"]
    tab_to(page, "Evaluate more tasks")
    page.keyboard.press("Enter")
    tab_to(page, "llmprune_agreement")
    page.keyboard.press("Space")
    tab_to(page, "Evaluate")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Evaluation of looked at: llmprune_agreement")
    expect(page.locator("#live .state")).to_have_text("succeeded")
    page.get_by_role("link", name="looked at", exact=True).click()
    expect(page.get_by_role("region", name="Made from this job")).to_contain_text("Evaluation of looked at")
    with page.expect_download() as download:
        tab_to(page, "Download as an archive")
        page.keyboard.press("Enter")
    assert download.value.suggested_filename.endswith(".tar")


def test_upload_an_archive_by_keyboard(page: Page, pruned: str, tmp_path: Path) -> None:
    """What is no archive is not sent; an archive is, and its job is shown. A file may be dropped on the page."""
    assert pruned
    archive, text = tmp_path / "run.tar", tmp_path / "notes.txt"
    with tarfile.open(archive, "w") as into:
        into.add(write_run(tmp_path / "run"), ".")
    text.write_text("no archive" * 100)
    page.goto("/models")
    page.locator("summary", has_text="Upload a run").focus()
    page.keyboard.press("Enter")
    page.get_by_label("Archive of the run").set_input_files(text)
    page.get_by_role("button", name="Upload").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").last).to_contain_text("notes.txt is no uncompressed tar archive")
    content = page.evaluate_handle(
        """bytes => { const held = new DataTransfer(); held.items.add(new File([new Uint8Array(bytes)], "run.tar"));
        return held; }""",
        list(archive.read_bytes()),
    )
    for kind in ("dragenter", "dragover", "drop"):
        page.dispatch_event("main", kind, {"dataTransfer": content})
    page.get_by_label("Name", exact=True).fill("from elsewhere")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("from elsewhere")
    expect(page.locator("#live .state")).to_have_text("succeeded")


def test_cancel_and_retry(page: Page, live: tuple[Client, Settings]) -> None:
    """The Cancel button ends a running job with its processes, and Retry queues it again."""
    job = live[0].submit(recipe(pause=60), name="endless").id
    page.goto(f"/jobs/{job}")
    expect(page.locator("#live")).to_contain_text("layer 1 of 2")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#live .state")).to_have_text("cancelled")
    assert processes_of_job(job) == []
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("#live .state")).to_have_text("running")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#live .state")).to_have_text("cancelled")


def test_by_keyboard_alone(page: Page, live: tuple[Client, Settings]) -> None:
    """Tab and Enter lead from the first page to a submitted job, with a visible focus at every stop."""
    page.goto("/")
    page.keyboard.press("Tab")
    assert "To the content" in page.evaluate(FOCUSED)["said"]
    tab_to(page, "New job")
    page.keyboard.press("Enter")
    expect(page).to_have_title(re.compile("New job"))
    tab_to(page, "Recipe")
    write_recipe(page, recipe(by="keyboard"))
    expect(page.locator("#outcome")).not_to_contain_text("Checking")
    tab_to(page, "Submit")
    page.keyboard.press("Enter")
    expect(page.locator("#live .state")).to_have_text("succeeded")
    assert live[0].job(page.url.rsplit("/", 1)[-1]).refresh().recipe == recipe(by="keyboard")


def test_questions_and_editor_follow_each_other(page: Page) -> None:
    """The questions follow the editor, an answer changes its value in the editor, and nothing else is lost."""
    new_job(page)
    recipe = page.locator("#recipe")
    write_recipe(page, "# mine\nmodel: {id: org/model}\ncalibration: {dataset: org/text}\ndepth: {remove: 5}\n")
    expect(page.get_by_label("Layers to remove")).to_have_value("5")
    page.get_by_label("Layers to remove").fill("7")
    expect(recipe).to_have_value(re.compile("# mine\n.*remove: 7", re.DOTALL))
    expect(page.get_by_label("Layers to remove")).to_be_focused()
    write_recipe(page, "model: [")
    expect(page.get_by_text("once the recipe can be read")).to_be_visible()
    write_recipe(page, "model: {id: org/model}\ncalibration: {dataset: org/text}\ndepth: {remove: 6}\n")
    expect(page.get_by_label("Layers to remove")).to_have_value("6")


def test_the_four_questions_by_keyboard(page: Page) -> None:
    """Arrow keys and Enter answer model, size, use and time; the recipe follows, and the focus stays."""
    new_job(page)
    recipe = page.locator("#recipe")
    page.get_by_role("button", name="tiny", exact=True).press("Enter")
    expect(recipe).to_have_value(re.compile("id: tiny\n"))
    expect(page.get_by_role("button", name="tiny", exact=True)).to_have_attribute("aria-pressed", "true")
    page.get_by_role("slider", name="Keep % of the parameters").press("ArrowLeft")
    expect(recipe).to_have_value(re.compile("parameters: 0.74\n"))
    expect(page.locator("output")).to_have_text("74")
    expect(page.get_by_role("radio", name="A first look")).to_be_checked()
    page.get_by_role("radio", name="A first look").press("ArrowDown")
    expect(recipe).not_to_have_value(re.compile("quick"))
    expect(page.get_by_label("Layers to remove")).to_be_hidden()
    page.get_by_role("radio", name="General").press("ArrowDown")
    expect(recipe).to_have_value(re.compile("asyncio"))
    expect(page.get_by_role("radio", name="Code")).to_be_focused()
    page.get_by_role("radio", name="Standard").press("ArrowDown")
    page.get_by_role("radio", name="More: train").press("ArrowDown")
    expect(recipe).to_have_value(re.compile("recover:\n +tokens: 50K"))
    expect(page.get_by_label("Tokens to train on")).to_have_value("50K")


def test_the_draft_is_kept_through_reload_and_another_page(page: Page) -> None:
    """Recipe and fields are restored, the questions follow, secrets are not stored, and a button begins anew."""
    new_job(page)
    recipe = page.locator("#recipe")
    write_recipe(page, "# mine\nmodel: {id: org/model}\ncalibration: {dataset: org/text}\ndepth: {remove: 5}\n")
    page.get_by_text("Name, devices, limits").click()
    page.get_by_label("Hub token for this job").fill("hf_secret")
    page.get_by_label("Name", exact=True).fill("by hand")
    page.get_by_role("link", name="Jobs", exact=True).click()  # before a second has passed
    page.get_by_role("link", name="New job").click()
    expect(recipe).to_have_value(re.compile("# mine\n.*remove: 5", re.DOTALL))
    expect(page.get_by_label("Layers to remove")).to_have_value("5")
    expect(page.locator("input[name=name]")).to_have_value("by hand")
    expect(page.locator("input[name=hub_token]")).to_have_value("")
    page.get_by_label("Layers to remove").fill("7")
    expect(page.get_by_text("Draft saved.")).to_be_visible()
    page.reload()
    expect(recipe).to_have_value(re.compile("# mine\n.*remove: 7", re.DOTALL))
    page.get_by_role("button", name="Discard it").click()
    expect(recipe).to_have_value(re.compile("^model:\n"))
    assert "hf_secret" not in page.evaluate("JSON.stringify([history.state, {...sessionStorage}, {...localStorage}])")


def test_a_submitted_recipe_comes_back_with_back(page: Page) -> None:
    """After submission Back shows the editor with the submitted recipe and a new key; a new page starts anew."""
    new_job(page)
    text, key = recipe(by="back"), page.locator("input[name=key]").input_value()
    write_recipe(page, text)
    page.get_by_role("button", name="Submit").click()
    expect(page).to_have_url(re.compile(r"/jobs/\w+$"))
    page.go_back()
    expect(page.locator("#recipe")).to_have_value(text)
    assert page.locator("input[name=key]").input_value() != key
    page.get_by_role("link", name="New job").click()
    expect(page.locator("#recipe")).to_have_value(re.compile("^model:\n"))


@pytest.mark.skipif(static_file("editor.js") is None, reason="the recipe editor is not built: make editor")
def test_the_editor_completes_shows_problems_at_their_lines_and_lets_the_focus_go(page: Page) -> None:
    """Keys come from the schema; a problem marks its line and leads to it; Escape and Tab leave the editor."""
    new_job(page)
    write_recipe(page, "model: {id: tiny}\ncalibration: {dataset: text.txt, samples: 4, sequence_length: 32}\n")
    page.keyboard.press("Control+End")
    page.keyboard.type("wid")
    page.get_by_role("option", name="width").click()  # Enter is not heeded in a list's first moments
    expect(page.get_by_role("option", name="heads_criterion")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.type("mlp: 7")
    expect(page.locator("#recipe")).to_have_value(re.compile("width:\n  mlp: 7$"))
    problem = page.locator("#outcome li", has_text="width.mlp")
    expect(problem).to_have_attribute("data-line", "4")
    expect(page.locator("#editor .cm-lintRange-error")).to_have_text(["mlp: 7"])
    assert faults_of_access(page) == []
    page.keyboard.press("Control+Home")
    problem.get_by_role("button", name="line 4").click()
    page.keyboard.type("5")
    expect(page.locator("#recipe")).to_have_value(re.compile("mlp: 75$"))
    expect(page.get_by_text("leaves the editor")).to_be_visible()
    page.keyboard.press("Tab")
    assert "cm-content" in page.evaluate("document.activeElement.shadowRoot?.activeElement?.className ?? ''")
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") != "editor"


def test_without_script_the_plain_field_is_the_editor(browser: Browser, live: tuple[Client, Settings]) -> None:
    """A browser that runs no script shows the recipe as text and submits it."""
    context = browser.new_context(base_url=live[0].server, java_script_enabled=False)
    page = context.new_page()
    page.goto("/submit")
    page.get_by_label("Recipe", exact=True).fill(recipe(by="no script"))
    page.get_by_role("button", name="Submit").click()
    expect(page).to_have_url(re.compile(r"/jobs/\w+$"))
    context.close()


def test_a_page_that_is_no_longer_fresh_says_so(browser: Browser, live: tuple[Client, Settings]) -> None:
    """An open page warns while the service cannot be reached, and only then."""
    context = browser.new_context(base_url=live[0].server, viewport=PHONE)
    page = context.new_page()
    page.goto("/")
    expect(page.get_by_role("alert")).to_be_hidden()
    context.set_offline(True)
    expect(page.get_by_role("alert")).to_contain_text("does not answer")
    context.set_offline(False)
    expect(page.get_by_role("alert")).to_be_hidden()
    context.close()


def test_mistakes_stay_in_the_editor(browser: Browser, live: tuple[Client, Settings]) -> None:
    """Problems are shown while typing and after submission, and the recipe is kept."""
    context = browser.new_context(base_url=live[0].server, viewport=WIDE)
    for page in quiet_page(context, live[0].server, refusals=True):
        new_job(page)
        write_recipe(page, "model: {id: /etc/passwd}\ncalibration: {dataset: org/text}\n")
        expect(page.get_by_role("alert")).to_contain_text("not allowed here")
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_role("alert").first).to_contain_text("model.id")
        expect(page.locator("#recipe")).to_have_value(re.compile("/etc/passwd"))
    context.close()


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
        page.goto("/submit")
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert (overflow(page), faults_of_access(page)) == (0, [])
        page.get_by_label("Token").fill("llmprune_wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("no such token")
        page.get_by_label("Token").fill(token)
        page.keyboard.press("Enter")
        expect(page).to_have_title(re.compile("New job"))
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


def test_a_running_job_is_followed(page: Page, live: tuple[Client, Settings]) -> None:
    """Its page has the steps and their times; its log grows until it is paused, at the width of a phone too."""
    client, settings = live
    steps = [{"name": "planning", "state": "done", "seconds": 2}, {"name": "pass 2", "state": "current", "seconds": 3}]
    told = {"step": "pass 2: cut", "done": 2, "total": 8, "seconds": 3, "steps": steps}
    job = client.submit(recipe(layers=1, pause=600, told=json.dumps(told)))
    page.goto(f"/jobs/{job.id}")
    expect(page.get_by_role("listitem").filter(has_text="Cut and repair")).to_have_attribute("aria-current", "step")
    expect(page.get_by_text("40 layers/min")).to_be_visible()
    page.set_viewport_size(PHONE)
    assert (overflow(page), faults_of_access(page)) == (0, [])
    page.get_by_role("link", name="Follow the log").click()
    with settings.log(job.id).open("a", encoding="utf-8") as log:
        log.writelines(f"line {number}\n" for number in range(90))
    expect(page.get_by_text("line 89")).to_be_in_viewport()  # the box keeps its end in view
    assert (overflow(page), faults_of_access(page)) == (0, [])
    page.get_by_role("link", name="Pause").click()
    page.get_by_label("Lines with").fill("LINE 7")
    page.keyboard.press("Enter")
    expect(page.get_by_text("line 79")).to_be_visible()
    expect(page.get_by_text("line 89")).to_have_count(0)
    job.cancel()
