"""The audit log for admins: filters, pages, rotated and damaged files, and the new actions in it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.service import RECIPE, YAML, ServiceHarness

from llmprune.service import audit_log, logs
from llmprune.service.audit_log import AuditQuery, read_audit
from llmprune.service.jobs.store_reads import Conflict

LOG = logs.AUDIT


def line(number: int, **fields: Any) -> str:
    """A line of the log, later than those of smaller numbers."""
    time = f"2026-01-{1 + number // 1440:02d}T{number // 60 % 24:02d}:{number % 60:02d}:00Z"
    return json.dumps(
        {"time": time, "caller": "ann", "action": "POST /v1/jobs", "status": 201} | fields | {"n": number}
    )


def write(path: Path, numbers: range, **fields: Any) -> None:
    """Write lines into a part of the log."""
    text = "".join(line(number, **fields) + "\n" for number in numbers).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def numbers(folder: Path, **query: Any) -> tuple[list[int], str | None]:
    """The lines of a page, and the cursor of the next one."""
    page = read_audit(folder, AuditQuery(**query))
    return [entry["n"] for entry in page.entries], page.next


@pytest.mark.parametrize("block", [7, 64, 256 * 1024])
def test_pages_lead_through_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """The newest line is first, and pages of any size show each line once, whatever the size of the blocks."""
    monkeypatch.setattr(audit_log, "_BLOCK", block)
    for name, part in ((LOG, range(60, 75)), (f"{LOG}.1", range(40, 60)), (f"{LOG}.2.gz", range(20, 40))):
        write(tmp_path / name, part)
    write(tmp_path / f"{LOG}.10.gz", range(20))
    write(tmp_path / f"{LOG}.bak", range(99, 100))
    for limit in (1, 7, 500):
        seen: list[int] = []
        before: str | None = None
        while True:
            found, before = numbers(tmp_path, limit=limit, before=before)
            seen += found
            if before is None:
                break
        assert seen == [*range(74, -1, -1)]


def test_a_log_that_is_rotated_between_two_pages(tmp_path: Path) -> None:
    """A renamed file keeps its place; one that is gone asks to begin anew."""
    write(tmp_path / LOG, range(10))
    first, before = numbers(tmp_path, limit=4)
    (tmp_path / LOG).rename(tmp_path / f"{LOG}.1")
    write(tmp_path / LOG, range(10, 12))
    second, _ = numbers(tmp_path, limit=500, before=before)
    assert first + second == [*range(9, -1, -1)]
    (tmp_path / f"{LOG}.1").unlink()
    with pytest.raises(Conflict, match="was rotated since"):
        numbers(tmp_path, before="123456789-0")


def test_filters(tmp_path: Path) -> None:
    """By user, who did it or to whom it was done; by part of the action, job and time, days as their whole."""
    lines = [
        line(0, caller="ann", location="/v1/jobs/0123456789ab"),
        line(1500, caller="bob", action="POST /v1/jobs/{job}/cancel", job="0123456789ab"),
        line(1501, caller="root", action="PATCH /v1/users/{user}", user="ann"),
        line(3000, caller="me (this machine)", action="token create", token="ann"),
    ]
    (tmp_path / LOG).write_text("\n".join(lines) + "\n")
    assert numbers(tmp_path, user="ann")[0] == [3000, 1501, 0]
    assert numbers(tmp_path, action="CANCEL")[0] == [1500]
    assert numbers(tmp_path, job="0123456789ab")[0] == [1500, 0]
    assert numbers(tmp_path, since="2026-01-02")[0] == [3000, 1501, 1500]
    assert numbers(tmp_path, until="2026-01-02")[0] == [1501, 1500, 0]
    assert numbers(tmp_path, since="2026-01-02T01:01", until="2026-01-02T02")[0] == [1501]
    assert numbers(tmp_path / "nowhere") == ([], None)


def test_damaged_and_huge_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut, foreign and endless lines are left out, and a long search ends with a place from which it goes on."""
    write(tmp_path / LOG, range(5))
    with (tmp_path / LOG).open("ab") as file:
        file.write(b"[" * 5000 + b'\n{"time": 5}\nnull\n\xff\xfe\n' + b"x" * 300_000 + b"\n")
        file.write(line(9).encode() + b'\n{"time": "2026-01-0')
    assert numbers(tmp_path)[0] == [9, 4, 3, 2, 1, 0]
    packed = gzip.compress("".join(line(n) + "\n" for n in range(2000)).encode())
    (tmp_path / f"{LOG}.1.gz").write_bytes(packed[: len(packed) // 2])
    assert len(numbers(tmp_path, limit=5000)[0]) > 6
    monkeypatch.setattr(audit_log, "_READ_AT_MOST", 200)
    page = read_audit(tmp_path, AuditQuery(user="nobody"))
    assert (page.entries, page.read_all, page.next is not None) == ([], False, True)


def test_admins_alone_read_it(tmp_path: Path) -> None:
    """API and page show entries to admins; the new actions have their subject and their values."""
    harness = ServiceHarness(tmp_path)
    create = harness.service.tokens.create
    admin, user = ({"Authorization": f"Bearer {create(name, name)}"} for name in ("admin", "user"))
    with logs.kept(harness.settings.data_dir):
        job = harness.submit(headers=user)["id"]
        harness.http.post(f"/v1/jobs/{job}/share", headers=user)
        harness.http.post("/v1/jobs", content=RECIPE, headers=YAML | {"Authorization": "Bearer wrong"})
        harness.http.post("/users/user", data={"role": "viewer", "email": "u@x.org"}, headers=admin)
        harness.http.post("/v1/jobs", content=RECIPE, headers=YAML | user)
        harness.http.post("/v1/account/tokens", json={"name": "<b>"}, headers=user)
    for path in ("/audit", "/v1/audit"):
        assert harness.http.get(path, headers=user).status_code == 403
    page = harness.http.get("/v1/audit", params={"limit": 3}, headers=admin).json()
    assert [(entry["action"], entry["status"]) for entry in page["entries"]] == [
        ("POST /v1/account/tokens", 422),
        ("POST /v1/jobs", 403),
        ("POST /users/{user}", 303),
    ]
    assert page["entries"][0]["details"]["name"] == "<b>"
    assert page["entries"][2]["details"] == {"role": "viewer", "email": "u@x.org"}
    older = harness.http.get("/v1/audit", params={"before": page["next"]}, headers=admin).json()
    assert [entry["job"] for entry in older["entries"]] == [job, job]
    html = admin | {"Accept": "text/html"}
    shown = harness.http.get("/audit", headers=html).text
    for words in ("submitted a job", "shared a job", "changed a user", "not allowed", f'href="/jobs/{job}"'):
        assert words in shown, words
    empty = harness.http.get("/audit?user=nobody", headers=html)
    assert "No entry matches" in empty.text
    assert harness.http.get("/audit?since=yesterday", headers=html).status_code == 422
    assert harness.http.get("/audit?before=1-2", headers=html).status_code == 409
    for wrong in ({"since": "x"}, {"before": "x"}, {"limit": 501}):
        assert harness.http.get("/v1/audit", params=wrong, headers=admin).status_code == 422, wrong
