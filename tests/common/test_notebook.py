"""Progress and reports in notebooks, without a kernel: what is handed to its display, with and without ipywidgets."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import IPython
import IPython.display
import pytest
from helpers.reports import sample_report
from helpers.service_answers import ENDED, EVENT, JOB, page, talking_to

from llmprune.common.errors import OutputError
from llmprune.common.notebook import bar_html, in_notebook, progress_in_notebook
from llmprune.common.progress import report_progress
from llmprune.results.notebook.report_page import ReportPage
from llmprune.results.tables.sizes import size_rows

EVIL = "<script>alert('x')</script>\x1b[31m"


class Shown:
    """What a notebook shows at one place, in its order."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def update(self, value: Any) -> None:
        """Show a value in place of the last."""
        self.values.append(value)

    @property
    def html(self) -> str:
        """The last value as HTML."""
        return str(self.values[-1].data)


@pytest.fixture(params=["ipywidgets", "HTML"])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shown]:
    """A kernel whose display is recorded."""
    shown = Shown()

    def display(value: Any, *, display_id: bool) -> Shown:
        assert display_id
        shown.update(value)
        return shown

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(IPython.display, "display", display)
    if request.param == "HTML":
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    yield shown
    assert (type(shown.values[0]).__name__ == "VBox") == (request.param == "ipywidgets")
    assert type(shown.values[-1]).__name__ == "HTML"  # what a saved notebook keeps needs no kernel


def test_a_run_shows_its_progress(shown: Shown) -> None:
    """A report of progress moves the bar; the end is plain HTML that says so."""
    with progress_in_notebook("Pruning org/model"):
        report_progress("pass 2: cut and refit", 3, total=12, detail="loss 2.1")
        first = shown.values[0]
        text = first.children[2].value if hasattr(first, "children") else shown.html
        assert "pass 2: cut and refit, 4 of 12, loss 2.1" in text
        assert "25%" in text
    assert "Pruning org/model" in shown.html
    assert "done" in shown.html
    report_progress("another run", 1, total=2)
    assert "another" not in shown.html


def test_a_failure_stays_in_the_cell(shown: Shown) -> None:
    """The first line of the error is shown, escaped, and the exception goes on."""
    with pytest.raises(OutputError), progress_in_notebook(EVIL):
        raise OutputError(f"{EVIL} cannot be used\nmore")
    assert "<script" not in shown.html
    assert "\x1b" not in shown.html
    assert "cannot be used" in shown.html
    with pytest.raises(KeyboardInterrupt), progress_in_notebook("a run"):
        raise KeyboardInterrupt
    assert "interrupted; run the same recipe again to continue" in shown.html


def test_a_job_of_a_service_shows_its_progress(shown: Shown) -> None:
    """``job.progress`` follows the events and ends with state, size and retention."""
    figures = {"parameters": [2, 1], "bytes": [2000, 1000], "layers": [2, 1], "retention": 0.9}
    body = f"id: 1\ndata: {json.dumps(EVENT | {'step': 'pass 1: scores', 'fraction': 0.5})}\n\n".encode()

    def answer(request: Any) -> Any:
        if request.url.path.endswith("/events"):
            return page(body, content_type="text/event-stream")
        if request.url.path.endswith("/usage"):
            return page(b'{"every": 5, "samples": [], "memory_limit": null, "disk_quota": null}')
        if request.url.path.endswith("/progress"):
            running = {"item": "layer"} | dict.fromkeys(("left", "items_per_minute", "tokens_per_second", "queue"))
            return page(json.dumps({"steps": []} | running).encode())
        return page(json.dumps(ENDED | {"figures": figures, "name": EVIL}).encode())

    with talking_to(answer) as client:
        job = client.job(JOB)
        job.progress()
    assert "2 KB → 1 KB (−50.0%), 90.0% retained" in shown.html
    assert "<script" not in shown.html
    bundle = job._repr_mimebundle_()
    assert bundle["text/html"] == shown.html
    assert bundle["text/plain"].startswith(f"job {JOB} <script>")


def test_outside_of_a_notebook_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal's IPython and plain Python are no notebooks; a job's progress are lines there."""
    assert not in_notebook()
    with progress_in_notebook("a run"):
        report_progress("a step", 1, total=2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("fraction", [None, 0.0, 0.5, 7.0])
def test_a_bar_is_plain_html(fraction: float | None) -> None:
    """No script, every text escaped, the width within its limits."""
    html = bar_html(EVIL, EVIL, fraction=fraction, style="info")
    assert "<script" not in html
    assert "width:700" not in html


def test_a_report_page_is_shown_in_a_frame_that_may_do_nothing(tmp_path: Path) -> None:
    """The frame has an empty sandbox, and its source is the page to the letter."""
    (tmp_path / "report.html").write_text(f'<p title="&quot;">{EVIL}')
    shown = ReportPage.load(tmp_path)
    html = shown._repr_html_()
    assert html.startswith('<iframe sandbox="" ')
    source = html.split('srcdoc="')[1].split('"')[0]
    assert unescape(source) == shown.html
    assert "<script" not in html
    assert shown.save(tmp_path / "copy.html").read_text() == shown.html
    with pytest.raises(OutputError, match="give the folder of a finished run"):
        ReportPage.load(tmp_path / "nothing")


def test_a_report_is_a_table_in_a_notebook() -> None:
    """Sizes, tasks, the verdict and warnings, escaped; figures of a report without evaluation are left out."""
    report = sample_report()
    html = report.model_copy(update={"warnings": (EVIL,)})._repr_html_()
    assert "<script" not in html
    assert all(f"{row.label}</th>" in html for row in size_rows(report.dense, report.pruned))
    assert "Gate " in html
    assert all(f"{task.task}, " in html for task in report.tasks)
    plain = report.model_copy(update={"tasks": (), "groups": (), "perplexity": None, "speed": None, "gate": None})
    assert "perplexity" not in plain._repr_html_()
