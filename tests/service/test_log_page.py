"""The page of a job's log: its end, older lines, search without secrets, and logs that are very long."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from helpers.service import ServiceHarness, recipe

from llmprune.service.jobs.hub_token import keep_token
from llmprune.service.monitoring import log_lines
from llmprune.service.monitoring.log_lines import Log, LogFilter, level_of

LINES = [f"line {number} {'x' * (number % 90)}" for number in range(3_000)]


def _log(folder: Path, content: bytes) -> Log:
    (folder / "log").write_bytes(content)
    return Log(folder / "log", lambda begin, end: content[begin:end])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """A log of many lines, the last one of which is not complete."""
    return _log(tmp_path_factory.mktemp("log"), ("\n".join(LINES) + "\nhalf").encode())


@pytest.mark.parametrize("block", [1_000, 2**18])
@pytest.mark.parametrize("wanted", ["", "LINE 17"])
def test_pages_in_both_directions_have_every_line_once(
    block: int, wanted: str, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of a block, and with a search too."""
    monkeypatch.setattr(log_lines, "BLOCK", block)
    expected = [line for line in LINES if wanted.lower() in line]
    forward: list[str] = []
    backward: list[str] = []
    place, end = 0, log.end(whole_lines=True)
    while place < end:
        page = log.since(place, LogFilter(wanted), count=70)
        forward += [line.text for line in page.lines]
        place = page.after
    while end > 0:
        page = log.before(end, LogFilter(wanted), count=70)
        backward = [line.text for line in page.lines] + backward
        end = page.before
    assert forward == backward == expected


def test_an_answer_reads_a_bounded_part(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that finds nothing says that it is not complete, and where it continues."""
    monkeypatch.setattr(log_lines, "BLOCK", 1_000)
    monkeypatch.setattr(log_lines, "MOST_SCANNED", 10_000)
    end, steps = log.end(whole_lines=True), 0
    while True:
        page = log.before(end, LogFilter("line 0 "), count=5)
        steps += 1
        assert end - page.before <= 10_000
        if page.is_complete:
            break
        end = page.before
    assert [line.text.strip() for line in page.lines] == ["line 0"]
    assert steps > 10


def test_a_line_without_an_end_is_shown_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood without line breaks is neither read at once nor shown in full; a bar shows its last state."""
    monkeypatch.setattr(log_lines, "BLOCK", 10_000)
    log = _log(tmp_path, b"first\n" + b"y" * 100_000 + b"\n 10%\r 50%\r100%\n")
    page = log.before(log.end(whole_lines=True), LogFilter(), count=200)
    assert (page.lines[0].text, page.lines[-1].text, page.before) == ("first", "100%", 0)
    assert all(len(line.text) <= 2_002 for line in page.lines)


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("WARNING llmprune.x: slow disk", "warning"), ("llmprune: the run failed", "error"),
        ("all errors are gone", ""),
        ("Traceback (most recent call last):", "error"), ("torch.OutOfMemoryError: CUDA", "error"),
        ("x.py:1: UserWarning: old", "warning"), ("INFO llmprune: fine", ""), ("llmprune: note: local path", ""),
    ],
)  # fmt: skip
def test_levels_are_recognised(line: str, level: str) -> None:
    """Errors and warnings stand out."""
    assert level_of(line) == level


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service with a queued job, whose log a test writes."""
    return ServiceHarness(tmp_path_factory.mktemp("service"))


def _shown(harness: ServiceHarness, job: str, **query: object) -> list[str]:
    page = harness.http.get(f"/jobs/{job}/log", params=query).text
    lines = re.findall(r'<div class="log-line[^>]*>(?:<span.*?</span>)?(.*?)</div>', page)
    return [html.unescape(line) for line in lines]


def test_no_search_finds_a_token_or_a_path_of_the_server(harness: ServiceHarness) -> None:
    """A line matches as it is shown; the beginning of a secret therefore finds nothing."""
    job = harness.submit(recipe())["id"]
    folder = harness.settings.folder(job)
    folder.mkdir(parents=True)
    keep_token(folder, "hf_secretsecretsecret")
    harness.settings.log(job).write_text("with hf_secretsecretsecret\nin /srv/secret/model.py\nplain <b>\n")
    assert _shown(harness, job) == ["with *********************", "in …/model.py", "plain <b>"]
    for query in ("hf_s", "secret", "/srv"):
        assert _shown(harness, job, q=query) == []
    assert _shown(harness, job, q="MODEL.py") == ["in …/model.py"]
    assert _shown(harness, job, q="***") == ["with *********************"]
    assert "hf_secret" not in harness.http.get(f"/jobs/{job}/log.txt").text


def test_the_page_follows_a_job_until_it_has_ended(harness: ServiceHarness) -> None:
    """New lines are added once; without any the page stays; a paused page does not ask; the end loads it anew."""
    job = harness.submit(recipe())["id"]
    log = harness.settings.log(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("one\nWARNING two\nhal")
    page = harness.http.get(f"/jobs/{job}/log").text
    more = html.unescape(re.search(r'hx-get="([^"]+)"', page)[1])  # type: ignore[index]
    assert "hal" not in _shown(harness, job)[-1]
    assert "hx-get" not in harness.http.get(f"/jobs/{job}/log?follow=off").text
    assert harness.http.get(more).status_code == 204
    with log.open("a") as file:
        file.write("f\nfour\n")
    added = harness.http.get(more).text
    assert re.findall(r">(\w+)</div>", added) == ["half", "four"]
    assert _shown(harness, job, level="warning") == ["WARNING two"]
    harness.service.jobs.cancel(job)
    assert harness.http.get(more).headers["HX-Refresh"] == "true"
    assert "hx-get" not in harness.http.get(f"/jobs/{job}/log").text


def test_an_empty_log_and_a_job_of_somebody_else(harness: ServiceHarness) -> None:
    """Nothing written yet is said, and others see no log at all."""
    job = harness.submit(recipe())["id"]
    assert "has written nothing" in harness.http.get(f"/jobs/{job}/log").text
    token = harness.service.tokens.create("bob", "user")
    for path in ("log", "log/more?since=0", "log.txt", "usage"):
        answer = harness.http.get(f"/jobs/{job}/{path}", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 404
    harness.service.tokens.revoke("bob")
