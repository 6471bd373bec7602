"""Pages of jobs: the list, a running and a finished job, comparison, download and upload."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

from helpers.browser import PHONE, faults_of_access, overflow, tab_to
from helpers.finished import write_run
from helpers.service import recipe
from playwright.sync_api import Browser, Page, expect

from llmprune.service.client.sync.client import Client
from llmprune.service.settings import Settings
from llmprune.service.supervisor.processes import processes_of_job


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
    """What is no archive is not sent; an archive is, and its job is shown. A file may be dropped on the page.

    While it is sent, it can be stopped, and nothing is typed that would not be sent.
    """
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
    name, sending = page.get_by_label("Name", exact=True), page.locator("#sending .note")
    name.fill("from elsewhere")
    page.route("**/models/upload", lambda _: None)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    expect(name).to_be_disabled()
    expect(sending).to_have_text("Begins.")
    page.keyboard.press("Enter")
    expect(sending).to_have_text("Stopped; nothing of it was kept.")
    expect(page.get_by_role("button", name="Upload")).to_be_focused()
    page.unroute("**/models/upload")
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
