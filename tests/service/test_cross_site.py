"""Attacks through a browser: requests of other sites, foreign names, markup in what users write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.service import RECIPE, YAML, ServiceHarness, recipe

WEB = Path(__file__).parents[2] / "llmprune" / "service" / "web"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:8321.evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 201),
        ({"Origin": "http://127.0.0.1:8321"}, 201),
        ({}, 201),
    ],
)
def test_other_sites_change_nothing(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    """A page of another site cannot submit a job, whatever its browser sends."""
    answer = ServiceHarness(tmp_path).http.post("/v1/jobs", content=RECIPE, headers=YAML | headers)
    assert answer.status_code == status


def test_forms_of_other_sites_are_refused(tmp_path: Path) -> None:
    """The types that a foreign form can send are no recipes, and the pages' forms refuse other sites."""
    harness = ServiceHarness(tmp_path)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert harness.http.post("/v1/jobs", content=RECIPE, headers={"Content-Type": kind}).status_code == 415
    job = harness.submit()["id"]
    for path in (f"/jobs/{job}/cancel", "/submit", "/login", "/logout"):
        assert harness.http.post(path, data={"recipe": RECIPE}, headers={"Origin": "http://evil"}).status_code == 403
    assert harness.job(job)["state"] == "queued"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8321", "127.0.0.1.evil.example", "127.0.0.1@evil", ""])
def test_foreign_names_of_this_address(tmp_path: Path, host: str) -> None:
    """Without tokens only loopback's own names are answered, which prevents DNS rebinding."""
    harness = ServiceHarness(tmp_path)
    assert harness.http.get("/v1/jobs", headers={"Host": host}).status_code == 403
    assert harness.http.get("/v1/jobs", headers={"Host": "localhost:8321"}).status_code == 200
    assert harness.http.get("/v1/jobs", headers={"Host": "[::1]:8321"}).status_code == 200


def test_policies(tmp_path: Path) -> None:
    """Every answer forbids foreign and inline scripts, frames and sniffing; a report may run no script at all."""
    harness = ServiceHarness(tmp_path)
    job = harness.submit()["id"]
    harness.until_ended(job)
    paths = [
        "/",
        "/submit",
        f"/jobs/{job}",
        "/compare",
        "/models",
        "/sweep",
        "/login",
        "/nowhere",
        "/v1/jobs",
        "/v1/nowhere",
        "/static/app.js",
    ]
    for path in paths:
        headers = harness.http.get(path, headers={"Accept": "text/html"}).headers
        policy = headers["Content-Security-Policy"]
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
    report = harness.http.get(f"/v1/jobs/{job}/report.html").headers["Content-Security-Policy"]
    assert report == (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'; frame-ancestors 'self'"
    )
    artifact = harness.http.get(f"/v1/jobs/{job}/artifacts/report.html").headers
    assert artifact["Content-Type"] == "application/octet-stream"
    assert artifact["Content-Disposition"].startswith("attachment")


def test_templates_have_no_inline_script() -> None:
    """Templates have no inline script, style or handler, which the policy would block, and mark nothing as safe."""
    for path in WEB.rglob("*.j2"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|hx-on|javascript:|\|\s*safe", text), (
            path.name
        )


def test_what_people_write_is_text(tmp_path: Path) -> None:
    """Markup in a name, a search or an error is shown as text."""
    harness = ServiceHarness(tmp_path)
    evil = "<img src=x onerror=alert(1)>\"'"
    job = harness.submit(f"# {evil}\n" + recipe(exit=1), name=evil)["id"]
    harness.until_ended(job)
    for path in (
        "/",
        f"/jobs/{job}",
        f"/now?job={job}",
        f"/submit?again={job}",
        f"/compare?job={job}",
        f"/?search={evil}",
    ):
        answer = harness.http.get(path, headers={"Accept": "text/html"})
        assert answer.status_code == 200
        assert "<img" not in answer.text, path
    assert (
        "<img" not in harness.http.post("/submit", data={"recipe": f"a: {evil}"}, headers={"Accept": "text/html"}).text
    )
    assert "<img" not in harness.http.post("/submit/check", data={"recipe": evil}).text
