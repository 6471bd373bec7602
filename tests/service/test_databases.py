"""Job table on SQLite and on PostgreSQL: same answers, one writer at a time, and a server that goes away."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import command
from helpers.postgresql import PostgresqlServer, server
from helpers.service import RECIPE, YAML, ServiceHarness

from llmprune.common.errors import OutputError
from llmprune.service.artifacts.parts import Use
from llmprune.service.database import schema, service_lock
from llmprune.service.database.database import Database, DatabaseUnavailable, IntegrityError
from llmprune.service.database.postgresql import PostgresqlDatabase
from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.jobs.follow_ups.work import Bench
from llmprune.service.jobs.job import Figures, JobQuery, JobRequest, NewJob, Outcome
from llmprune.service.jobs.run_times import RunTimes, known_run_times
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.store_reads import Conflict, QueueFull
from llmprune.service.jobs.uses import jobs_in_use
from llmprune.service.notifications.cipher import TargetCipher, encrypt_targets
from llmprune.service.notifications.outbox import Outbox
from llmprune.service.notifications.targets import Target
from llmprune.service.supervisor.__main__ import _stop
from llmprune.service.users.quotas import Quotas

NEW = NewJob("ann", "org/model", "r", (), JobRequest(name="first"))
WRITERS = 6


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Database]:
    """Open one database again and again, each time as another process would."""
    if request.param == "PostgreSQL":
        url = server().new_database()
        return lambda: PostgresqlDatabase(url)
    SqliteDatabase(tmp_path / "jobs.sqlite3").migrate()
    return lambda: SqliteDatabase(tmp_path / "jobs.sqlite3")


@pytest.fixture
def postgresql() -> Iterator[PostgresqlServer]:
    """A server that a test may stop; it runs again at the end."""
    found = server()
    yield found
    found.restart()


def add(jobs: JobStore, number: int, *, key: str | None = None, **changes: Any) -> tuple[str, bool]:
    """Queue a job under a number; return its id, and whether it is new."""
    new = replace(NEW, key=key, digest=key or "", **changes)
    job, is_new = jobs.add(f"{number:012x}", new, quotas=Quotas(queued=10, kept=100))
    return job.id, is_new


def test_run_times_and_notifications_are_the_same(connect: Callable[[], Database], tmp_path: Path) -> None:
    """What an end writes besides the job: its time for the next one of its kind, and what is to be sent."""
    jobs, outbox = JobStore(connect()), Outbox(connect(), TargetCipher(tmp_path))
    with connect().write() as connection:  # as an earlier version wrote it
        connection.execute("INSERT INTO notify_defaults VALUES ('ann', 'webhook', 'https://example.org/secret')")
    encrypt_targets(connect(), outbox.cipher)
    assert "secret" not in connect().read("SELECT target FROM notify_defaults")[0]["target"]
    assert outbox.defaults("ann").targets == (Target("webhook", "https://example.org/secret"),)
    outbox.set_defaults("ann", [Target("email", "ann@example.org")])
    for number, seconds in enumerate((20.0, 5.0)):
        job, _ = add(jobs, number)
        jobs.start(job, [])
        jobs.end(job, Outcome("succeeded", 0), ran_seconds=seconds)
    found = jobs.get(job)
    assert found is not None
    assert known_run_times(connect(), [found]) == {job: RunTimes(2, 5.0, 5.0, 20.0)}
    due = outbox.due(time.time(), limit=8)
    assert [one.body["data"]["state"] for one in due] == ["succeeded"] * 2
    assert not outbox.failed(due[0], "no answer")
    outbox.delivered(due[1])
    [delivered] = outbox.deliveries(due[1].body["data"]["id"])
    assert (delivered.state, delivered.tries, delivered.target) == ("delivered", 1, "a…@example.org")
    outbox.forget_old(time.time() + 40 * 86_400)
    assert outbox.deliveries(due[1].body["data"]["id"]) == []
    assert len(outbox.due(time.time() + 11, limit=8)) == 1
    jobs.delete(job)
    assert outbox.targets(job).targets == ()


def test_the_job_table_answers_the_same(connect: Callable[[], Database]) -> None:
    """Lists, search, counts, events and changes of state work on both databases."""
    jobs = JobStore(connect())
    first, second, third = (add(jobs, number, owner=owner)[0] for number, owner in enumerate(("ann", "bob", "ann")))
    named = JobRequest(name=r"50%_of\it", shared=True, time_limit=0.1)
    fourth, _ = add(jobs, 9, owner="bob", request=named)
    assert [job.id for job in jobs.page(JobQuery("ann")).jobs] == [fourth, third, first]
    assert [job.id for job in jobs.page(JobQuery(None, limit=2)).jobs] == [fourth, third]
    for part, found in ((r"0%_OF\i", [fourth]), ("FIRST", [third, second, first]), ("5_", []), (first, [first])):
        assert [job.id for job in jobs.page(JobQuery(None, search=part)).jobs] == found, part
    assert jobs.start(first, ["0"]) is not None
    jobs.progress(first, 1.5, news={"step": "scoring", "fraction": 0.3})
    jobs.end(first, Outcome("failed", 1, "a\0b ∞"), ran_seconds=2.25)
    jobs.cancel(second)
    jobs.retry(first, quotas=Quotas())
    ended = jobs.get(first)
    assert ended is not None
    assert (ended.state, ended.ran_before, ended.shared) == ("queued", 2.25, False)
    assert {state: n for state, n in jobs.counts(viewer="ann").items() if n} == {"queued": 3}
    kinds = [row["kind"] for row in jobs.events(first, 0)]
    assert kinds == ["state", "state", "progress", "state", "state"]
    assert len(jobs.events(first, jobs.events(first, 0)[1]["id"])) == 3
    jobs.delete(second)
    assert (jobs.get(second), jobs.events(second, 0)) == (None, [])
    assert jobs.get(fourth).time_limit == 0.1  # type: ignore[union-attr]


def test_writers_wait_for_each_other(connect: Callable[[], Database]) -> None:
    """Of many writers at once one starts the job, one adds the key's job, and no queue grows above its limit."""
    stores = [JobStore(connect()) for _ in range(WRITERS)]
    job, _ = add(stores[0], 99, owner="eve")

    def write(number: int) -> tuple[bool, tuple[str, bool], int]:
        jobs, refused = stores[number], 0
        started = jobs.start(job, [str(number)]) is not None
        same = add(jobs, 200 + number, owner="bob", key="k")
        for one in range(4):
            try:
                add(jobs, 1000 + 10 * number + one)
            except QueueFull:
                refused += 1
        return started, same, refused

    with ThreadPoolExecutor(WRITERS) as threads:
        done = list(threads.map(write, range(WRITERS)))
    assert sum(started for started, _, _ in done) == 1
    assert len({same for _, (same, _), _ in done}) == sum(is_new for _, (_, is_new), _ in done) == 1
    assert sum(refused for *_, refused in done) == 4 * WRITERS - 10
    assert stores[0].counts(viewer="ann")["queued"] == 10
    with pytest.raises(Conflict):
        stores[0].add("f" * 12, replace(NEW, owner="bob", key="k", digest="other"), quotas=Quotas(queued=10, kept=100))


def test_a_transaction_is_written_whole_or_not_at_all(connect: Callable[[], Database]) -> None:
    """An error in the block undoes its statements; a value that exists already is an IntegrityError."""
    database = connect()
    add(JobStore(database), 1)

    def interrupted() -> None:
        with database.write() as connection:
            connection.execute("DELETE FROM jobs")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert len(database.read("SELECT id FROM jobs")) == 1
    with pytest.raises(IntegrityError):
        add(JobStore(database), 1)


def test_both_databases_have_the_same_tables(tmp_path: Path) -> None:
    """The migrations are numbered without gaps, and give the same tables, columns and indexes on both databases."""
    numbers = [step.number for step in schema.steps("sqlite")]
    assert numbers == [step.number for step in schema.steps("postgresql")] == list(range(1, len(numbers) + 1))
    sqlite, other = SqliteDatabase(tmp_path / "jobs.sqlite3"), PostgresqlDatabase(server().new_database(migrated=False))
    assert (other.version(), other.is_current()) == (0, False)
    sqlite.migrate()
    other.migrate()
    assert sqlite.version() == other.version() == schema.latest()
    columns = other.read(
        "SELECT table_name AS t, column_name AS c FROM information_schema.columns WHERE table_schema = 'public'"
    )
    of_sqlite = sqlite.read(
        "SELECT m.name AS t, c.name AS c FROM sqlite_master m, pragma_table_info(m.name) c "
        "WHERE m.type = 'table' AND m.name <> 'sqlite_sequence'"
    )
    assert {(row["t"], row["c"]) for row in columns} - {("schema_version", "version")} == {
        (row["t"], row["c"]) for row in of_sqlite
    }
    indexes = {row["i"] for row in other.read("SELECT indexname AS i FROM pg_indexes WHERE schemaname = 'public'")}
    of_sqlite = sqlite.read("SELECT name AS i FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
    of_postgresql = {name for name in indexes - {"jobs_by_text"} if not re.search(r"_p?key\d*$", name)}
    assert {row["i"] for row in of_sqlite} == of_postgresql
    with other.write() as connection:
        connection.execute("UPDATE schema_version SET version = 9999")
    with pytest.raises(OutputError, match="a newer one made it"):
        other.migrate()


def test_lost_connections_are_opened_again(postgresql: PostgresqlServer, tmp_path: Path) -> None:
    """Requests get 503 with Retry-After while the server is away, and all continues when it is back."""
    url = postgresql.new_database()
    harness = ServiceHarness(tmp_path, database_url=url)
    job = harness.submit()["id"]
    postgresql.stop()
    for answer in (
        harness.http.get("/v1/jobs"),
        harness.http.post("/v1/jobs", content=RECIPE, headers=YAML),
        harness.http.get("/v1/ready"),
    ):
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
        assert answer.json()["detail"] == "the database cannot be reached at the moment"
    assert harness.http.get("/v1/health").status_code == 200
    with pytest.raises(DatabaseUnavailable):
        harness.supervisor.round()
    _stop(harness.supervisor)  # it knows of no jobs to end, and raises nothing
    postgresql.start()
    assert harness.until_ended(job)["state"] == "succeeded"
    database = PostgresqlDatabase(url)

    def delete_without_connection() -> None:
        with database.write() as connection:
            connection.execute("DELETE FROM jobs")
            others = "datname = current_database() AND pid <> pg_backend_pid()"
            PostgresqlDatabase(url).read(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")

    with pytest.raises(DatabaseUnavailable):
        delete_without_connection()
    assert harness.job(job)["state"] == "succeeded"


def test_one_service_on_a_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second service is refused, and a lock whose connection was lost is taken again."""
    monkeypatch.setattr(service_lock, "_CHECK_EVERY", 0.02)
    monkeypatch.setattr(service_lock, "_RELEASED_WITHIN", 0.2)
    url = server().new_database()
    database = PostgresqlDatabase(url)
    held = "SELECT count(*) AS n FROM pg_locks WHERE locktype = 'advisory' AND pid <> ?"

    def holders(besides: int = 0) -> int:
        return int(database.read(held, (besides,))[0]["n"])

    with database.only_service():
        outcome = command("serve", "--gpus", "none", "--data-dir", tmp_path / "data", "--database", url)
        assert (outcome.code, "another llmprune serve uses the PostgreSQL database" in outcome.err) == (2, True)
        lost = database.read("SELECT pid FROM pg_locks WHERE locktype = 'advisory'")[0]["pid"]
        database.read("SELECT pg_terminate_backend(?)", (lost,))
        while not holders(besides=lost):
            pass
        assert command("token", "list", "--data-dir", tmp_path / "data", "--database", url).code == 0
    while holders():  # the server ends a closed connection a moment later
        pass


def test_what_is_read_is_answered_the_same(connect: Callable[[], Database]) -> None:
    """A follow-up is found by the job that it was made from, and keeps that job's files until it has ended."""
    jobs = JobStore(connect())
    parent, _ = add(jobs, 1)
    assert jobs.start(parent, []) is not None
    figures = Figures(parameters=(2, 1), bytes=(2, 1), layers=(2, 1)).model_dump_json()
    jobs.end(parent, Outcome("succeeded", 0, results={"figures": figures}))
    child, _ = add(
        jobs, 2, uses=(Use(parent, "run"),), request=JobRequest(name="timed", made_from=parent, work=Bench())
    )
    assert [job.id for job in jobs.page(JobQuery(None, made_from=parent)).jobs] == [child]
    assert jobs_in_use(connect()) == {parent}
    assert not jobs.clean(parent, lambda: None)
    with pytest.raises(Conflict, match="reads the files"):
        jobs.delete(parent)
    found = jobs.get(child)
    assert found is not None
    assert (found.work, found.reads, found.base) == (Bench(), parent, None)
    jobs.cancel(child)
    assert jobs_in_use(connect()) == set()
    assert jobs.clean(parent, lambda: None)
    with pytest.raises(Conflict, match="has deleted the model"):
        jobs.retry(child, quotas=Quotas())
