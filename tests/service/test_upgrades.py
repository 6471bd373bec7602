"""Upgrades: databases of every earlier schema, and jobs that run while a newer version takes over."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.old_schemas import FOLDER
from helpers.postgresql import server
from helpers.service import RECIPE, ServiceHarness, recipe, settings_in

from llmprune.service.artifacts.parts import Use
from llmprune.service.backup.tables import copy_from_file
from llmprune.service.database.postgresql import PostgresqlDatabase
from llmprune.service.database.schema import latest, steps
from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.jobs.job import JobQuery, Outcome
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.store_reads import Conflict
from llmprune.service.jobs.uses import jobs_in_use
from llmprune.service.supervisor.attempts import launch_of
from llmprune.service.supervisor.launchers import make_launchers
from llmprune.service.users.quotas import Quotas, own_quotas

SCHEMAS = sorted(FOLDER.glob("*.sql"))
Rows = dict[str, list[dict[str, Any]]]


REBUILT = ("tokens", "sessions")  # with columns of another meaning since there are users; see test_accounts.py
MOVED = {  # columns whose data is in another table now
    "jobs": {"reads"},
    "bases": {"job", "base"},
    "user_quotas": {"owner", "queued", "running", "gpus", "disk", "per_day", "kept"},
}


def rows(connection: sqlite3.Connection) -> Rows:
    """Return all rows of all tables."""
    connection.row_factory = sqlite3.Row
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {name: [{**row} for row in connection.execute(f"SELECT * FROM {name}")] for name in tables}


def made(path: Path, schema: Path) -> Rows:
    """Make the database of an earlier schema, and return its rows."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(schema.read_text(encoding="utf-8"))
        return rows(connection)


def quick(path: Path) -> SqliteDatabase:
    """Open a database that does not wait for the disk after each of the migrations."""
    database = SqliteDatabase(path)
    database.connection().execute("PRAGMA synchronous = OFF")
    return database


def described(path: Path) -> dict[str, set[str]]:
    """Return the columns and indexes of every table."""
    with closing(sqlite3.connect(path)) as connection:
        found = {
            name: {str(row[1]) for row in connection.execute(f"PRAGMA table_info({name})")} for name in rows(connection)
        }
        for name, table in connection.execute(
            "SELECT name, tbl_name FROM sqlite_master WHERE type = 'index'"
        ).fetchall():
            found[table].add(name)
        return found


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Tables of a new database of this version."""
    path = tmp_path_factory.mktemp("fresh") / "jobs.sqlite3"
    SqliteDatabase(path).migrate()
    return described(path)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda path: path.stem)
def test_every_earlier_schema_is_migrated(tmp_path: Path, schema: Path, fresh: dict[str, set[str]]) -> None:
    """All rows survive, the tables are those of a new database, and every job can be read and changed."""
    path = tmp_path / "jobs.sqlite3"
    before = made(path, schema)
    database = quick(path)
    database.migrate()
    jobs = JobStore(database)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        after = rows(connection)
    assert (database.version(), described(path)) == (latest(), fresh)
    for table, old in before.items():
        columns = (old[0].keys() if old else set()) - MOVED.get(table, set())
        if table not in REBUILT and columns:
            kept, wanted = ([{name: row[name] for name in columns} for row in one] for one in (after[table], old))
            assert kept == wanted, table
    assert len(after["jobs"]) == len(before["jobs"]) == 6
    page = jobs.page(JobQuery(None)).jobs
    assert [job.unreadable for job in page] == [()] * 6
    assert {job.state: job.ran_seconds for job in page} == dict.fromkeys(
        ("queued", "running", "cancelling", "cancelled", "failed", "succeeded"), 1234.0625
    )
    assert jobs.retry(f"{3:012x}", quotas=Quotas()).state == "queued"


def test_what_jobs_need_of_others_is_moved(tmp_path: Path) -> None:
    """Follow-ups, pushes and bases of an earlier schema keep the files of their job from being deleted."""
    path = tmp_path / "jobs.sqlite3"
    made(path, FOLDER / "0020.sql")
    database = quick(path)
    database.migrate()
    jobs = JobStore(database)
    queued, running, _, cancelled, _, parent = (f"{number:012x}" for number in range(6))
    found = {job: one.uses for job in (queued, running, cancelled) if (one := jobs.get(job)) is not None}
    wanted = {queued: (Use(parent, "scores"),), running: (Use(parent, "model"),), cancelled: (Use(parent, "run"),)}
    assert (found, jobs_in_use(database)) == (wanted, {parent})
    with pytest.raises(Conflict, match="a job of another user reads the files"):
        jobs.delete(parent)
    jobs.end(running, Outcome("failed", 1))
    jobs.cancel(queued)
    jobs.delete(parent)
    with pytest.raises(Conflict, match="was deleted"):
        jobs.retry(queued, quotas=Quotas())


def test_a_quota_of_before_without_a_limit_has_none(tmp_path: Path) -> None:
    """Of a user's quotas those that were the service's stay so, and -1 becomes None."""
    path = tmp_path / "jobs.sqlite3"
    made(path, FOLDER / "0023.sql")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE user_quotas SET queued = -1, running = 0, gpus = NULL, disk = 5000000000000")
        connection.commit()
    database = quick(path)
    database.migrate()
    wanted = {"queued": None, "running": 0, "disk": 5_000_000_000_000, "per_day": 1, "kept": 1}
    assert own_quotas(database, "ann") == wanted


@pytest.mark.parametrize("schema", [SCHEMAS[0], SCHEMAS[-1]], ids=lambda path: path.stem)
def test_every_row_of_sqlite_fits_into_postgresql(tmp_path: Path, schema: Path) -> None:
    """A migrated database has the same rows after a copy into PostgreSQL."""
    path = tmp_path / "jobs.sqlite3"
    made(path, schema)
    SqliteDatabase(path).migrate()
    target = PostgresqlDatabase(server().new_database())
    copy_from_file(path, target)
    with closing(sqlite3.connect(path)) as connection:
        for table, wanted in rows(connection).items():
            if not table.startswith("sqlite_"):
                found = [{**row} for row in target.read(f"SELECT * FROM {table}")]
                assert sorted(map(str, found)) == sorted(map(str, wanted)), table


def test_a_job_runs_on_through_an_upgrade(tmp_path: Path) -> None:
    """An attempt that was started with an earlier schema is found by the newer service and ends right, once."""
    settings = settings_in(tmp_path, database_url=None)
    settings.prepare()
    job, text = "a" * 12, recipe(layers=3, pause=0.2)
    row = {
        "id": job, "owner": "local", "name": "n", "model": "org/model", "recipe": text, "overrides": "[]",
        "launcher": "local", "gpus": 0, "priority": 0, "state": "running", "attempts": 1, "devices": "[]",
        "created": 1.7e9, "started": 1.7e9,
    }  # fmt: skip
    with closing(sqlite3.connect(settings.database)) as connection:
        for step in steps("sqlite")[:9]:
            connection.executescript(step.sql)
        marks = ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO jobs ({', '.join(row)}) VALUES ({marks})", [*row.values()])
        connection.execute("PRAGMA user_version = 9")
        connection.commit()
    shutil.copy(settings.database, tmp_path / "copy.sqlite3")
    copied = SqliteDatabase(tmp_path / "copy.sqlite3")
    copied.migrate()
    found = JobStore(copied).get(job)
    assert found is not None
    launch = launch_of(found, settings)
    launch.folder.mkdir(parents=True)
    (launch.folder / "recipe.yaml").write_text(text)
    make_launchers(settings)["local"].start(launch)
    harness = ServiceHarness(tmp_path, database_url=None)  # the newer service
    ended = harness.until_ended(job)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 1)
    assert harness.service.database.version() == latest()
    assert not (launch.folder / "run" / "TWICE").exists()
    assert harness.submit(RECIPE)["state"] == "queued"
