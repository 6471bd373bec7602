"""Backups of the job table: made while the service runs, restored on either database, refused where they cannot be."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Outcome, command
from helpers.postgresql import server
from helpers.service import ServiceHarness, recipe, settings_in

from llmprune.service.database import schema
from llmprune.service.database.open_database import open_database
from llmprune.service.jobs.job import JobRequest, NewJob
from llmprune.service.jobs.store import JobStore
from llmprune.service.settings import Settings
from llmprune.service.users.quotas import Quotas

NEW = NewJob("ann", "org/model", "r", (), JobRequest(name="n"), key="k", digest="d")
KINDS = ["SQLite", "PostgreSQL"]


def place(folder: Path, kind: str) -> Settings:
    """Settings of a service without a job table, whose data folder or database is empty."""
    return settings_in(folder, database_url=server().new_database(migrated=False) if kind == "PostgreSQL" else None)


def on(settings: Settings, *arguments: str | Path) -> Outcome:
    """Run a command on the job table of the settings."""
    database = ("--database", settings.database_url) if settings.database_url else ()
    return command(*arguments, "--data-dir", settings.data_dir, *database)


def filled(settings: Settings, jobs: int) -> JobStore:
    """Make a job table with some jobs and a token."""
    settings.prepare()
    database = open_database(settings)
    database.migrate()
    store = JobStore(database)
    for number in range(jobs):
        new = replace(NEW, key=str(number), request=JobRequest(name=f"∞ {number}", time_limit=0.1, shared=number == 1))
        store.add(f"{number:012x}", new, quotas=Quotas(queued=99, kept=99))
    store.start("0" * 12, ["0"])
    assert on(settings, "token", "create", "--name", "ann").code == 0
    return store


def contents(store: JobStore) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the tables that are restored."""
    tables = ("jobs", "events", "idempotency", "tokens")
    return {name: [{**row} for row in store.database.read(f"SELECT * FROM {name} ORDER BY 1, 2")] for name in tables}


@pytest.mark.parametrize(("source", "target"), [(KINDS[0], KINDS[0]), (KINDS[0], KINDS[1]), (KINDS[1], KINDS[0])])
def test_a_backup_is_restored_on_either_database(tmp_path: Path, source: str, target: str) -> None:
    """Every row comes back as it was, and the numbers of new jobs and events go on after the old ones."""
    before, after, saved = place(tmp_path / "a", source), place(tmp_path / "b", target), tmp_path / "saved.tar.gz"
    jobs = filled(before, 3)
    made = on(before, "backup", "-o", saved)
    assert (made.code, "3 jobs and 0 files of jobs" in made.out, saved.stat().st_mode & 0o077) == (0, True, 0), made.err
    assert on(after, "restore", saved).code == 0
    restored = JobStore(open_database(after))
    assert contents(restored) == contents(jobs)
    job, is_new = restored.add("f" * 12, replace(NEW, key="new"), quotas=Quotas(queued=99, kept=99))
    assert (is_new, job.seq) == (True, 4)
    assert [event["id"] for event in restored.events("f" * 12, 0)] == [5]
    again = on(after, "restore", saved)
    assert again.code == 2
    assert "is not empty" in again.err or "move the job table away first" in again.err


def test_reports_come_back_and_tokens_stay_out(tmp_path: Path) -> None:
    """With reports a restored service shows them; hub tokens and models are in no backup."""
    harness = ServiceHarness(tmp_path / "a", database_url=None)
    job = harness.submit(recipe(), headers={"X-Hub-Token": "hf_secret"})["id"]
    assert harness.until_ended(job)["state"] == "succeeded"
    waiting = harness.submit(recipe(n=1), headers={"X-Hub-Token": "hf_secret"})["id"]
    saved, after = tmp_path / "saved.tar.gz", place(tmp_path / "b", "SQLite")
    assert on(harness.settings, "backup", "-o", saved, "--with-reports").code == 0
    with tarfile.open(saved) as archive:
        names = archive.getnames()
    assert f"jobs/{job}/run/report.json" in names
    assert not [name for name in names if "token" in name or "/model/" in name or waiting in name]
    assert on(after, "restore", saved).code == 0
    restored = ServiceHarness(tmp_path / "b", database_url=None)
    assert restored.http.get(f"/v1/jobs/{job}/report").json() == harness.http.get(f"/v1/jobs/{job}/report").json()
    assert restored.http.get(f"/v1/jobs/{waiting}").json()["state"] == "queued"


@pytest.mark.parametrize("kind", KINDS)
def test_a_backup_shows_one_instant(tmp_path: Path, kind: str) -> None:
    """While jobs come in, a backup has each with its event, or neither."""
    settings = place(tmp_path, kind)
    store, over = filled(settings, 1), threading.Event()

    def submit() -> None:
        number = 1
        while not over.is_set():
            store.add(f"{number:012x}", replace(NEW, key=str(number)), quotas=Quotas(queued=10**6, kept=10**6))
            number += 1

    writer = threading.Thread(target=submit)
    writer.start()
    try:
        for number in range(3):
            assert on(settings, "backup", "-o", tmp_path / f"{number}.tar.gz").code == 0
    finally:
        over.set()
        writer.join()
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar.gz") as archive:
            tables = json.load(archive.extractfile("manifest.json"))["tables"]  # type: ignore[arg-type]
        assert tables["events"] == tables["jobs"] + 1  # the first job has started


def altered(saved: Path, changed: Path, alter: Callable[[str, bytes], tuple[str, bytes]]) -> None:
    """Copy a backup with other names and contents of its files."""
    with tarfile.open(saved) as source, tarfile.open(changed, "w") as target:
        for member in source:
            name, content = alter(member.name, source.extractfile(member).read())  # type: ignore[union-attr]
            found = tarfile.TarInfo(name)
            found.size = len(content)
            target.addfile(found, io.BytesIO(content))


def test_what_cannot_be_restored_is_refused(tmp_path: Path) -> None:
    """Damaged and newer backups, other files, and a missing job table exit with 2 and leave no job table."""
    settings, after = place(tmp_path / "a", "SQLite"), place(tmp_path / "b", "SQLite")
    saved = tmp_path / "saved.tar.gz"
    absent = on(settings, "backup", "-o", saved)
    assert (absent.code, "has no job table" in absent.err, settings.database.exists()) == (2, True, False)
    filled(settings, 1)
    assert on(settings, "backup", "-o", saved).code == 0
    assert "exists; give another name" in on(settings, "backup", "-o", saved).err
    number = f'"schema_version": {schema.latest()}'.encode()
    whole = saved.read_bytes()
    wrong: dict[str, Callable[[str, bytes], tuple[str, bytes]]] = {
        "is damaged": lambda name, old: (name, old.replace(b"ann", b"bob") if name.endswith("3") else old),
        "restore it with that version": lambda name, old: (name, old.replace(number, b'"schema_version": 999')),
        "its first file is not manifest.json": lambda name, old: (f"other-{name}", old),
        "no backup that this llmprune can read": lambda name, old: (name, old.replace(b'"format": 1', b'"format": 2')),
    }
    for said, alter in wrong.items():
        altered(saved, tmp_path / "wrong.tar", alter)
        outcome = on(after, "restore", tmp_path / "wrong.tar")
        assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    for content in (b"no archive", whole[: len(whole) // 2]):
        (tmp_path / "wrong.tar").write_bytes(content)
        assert on(after, "restore", tmp_path / "wrong.tar").code == 2
    assert not list(after.data_dir.glob("*sqlite3*"))
    outside = tmp_path / "outside.tar"
    altered(saved, outside, lambda name, old: (name, old))
    with tarfile.open(outside, "a") as archive:
        for name in ("jobs/../../escaped.json", "/tmp/escaped.json", "jobs/000000000000/.hidden.json"):
            archive.addfile(tarfile.TarInfo(name))
    assert on(after, "restore", outside).code == 0
    assert not [*tmp_path.rglob("*escaped*"), *tmp_path.rglob(".hidden*")]
