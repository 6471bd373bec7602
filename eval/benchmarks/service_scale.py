"""Lists of a service with 50 users, 2,000 live jobs and 100,000 jobs in the table, on SQLite and on PostgreSQL."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
from common import record
from helpers.postgresql import remove_server, server
from helpers.service import free_port, start, supervisor_of
from service_requests import wait_for

from llmprune.service.client.sync.client import Client
from llmprune.service.database.database import Database
from llmprune.service.database.open_database import open_database
from llmprune.service.database.postgresql import PostgresqlDatabase
from llmprune.service.jobs.job import ENDED, JobQuery, JobRequest, NewJob
from llmprune.service.jobs.store import JobStore
from llmprune.service.settings import Settings
from llmprune.service.users.quotas import Quotas
from llmprune.service.users.tokens import Tokens

USERS, LIVE, RUNNING, IN_TABLE = 50, 2_000, 10, 100_000
THINKING = 2.0  # seconds between the requests of one user, as an open page has
_AT_ONCE = 5_000  # rows of one statement
_FIGURES = {
    "parameters": [10**9, 8 * 10**8], "bytes": [2 * 10**9, 16 * 10**8], "layers": [32, 28], "retention": 0.98,
    "interval": [0.97, 0.99], "perplexity": [9.5, 10.25],
}  # fmt: skip
_RECIPE = "model: {id: org/model}\ncalibration: {dataset: org/text}\ndepth: {remove: 4}\n" + "# a comment\n" * 40


def fill(database: Database, jobs: int, *, live: int) -> None:
    """Add jobs of all users, the last ``live`` of them waiting, each with its events."""
    chance, store = random.Random(0), JobStore(database)
    new = NewJob("user-0", "org/model-1b", _RECIPE, (), JobRequest(name="template"))
    template, _ = store.add("a" * 12, new, quotas=Quotas())
    with database.write() as connection:
        connection.execute("DELETE FROM events WHERE job = ?", (template.id,))
    rows: list[dict[str, Any]] = []
    for number in range(jobs):
        is_live = number >= jobs - live
        state = "queued" if is_live else chance.choice(ENDED)
        rows.append(
            {
                "id": f"{number:012x}",
                "owner": f"user-{chance.randrange(USERS)}",
                "name": f"model-{chance.randrange(40)} at {chance.randrange(20, 100)}%",
                "model": f"org/model-{chance.randrange(40)}b",
                "state": state,
                "shared": int(chance.random() < 0.1),
                "error": "the run was killed" if state == "failed" else None,
                "figures": None if is_live else json.dumps(_FIGURES),
            }
        )
    kept = dict(database.read("SELECT * FROM jobs WHERE id = ?", (template.id,))[0])
    kept.pop("seq")
    store.cancel(template.id)
    for begin in range(0, jobs, _AT_ONCE):
        part = rows[begin : begin + _AT_ONCE]
        _insert(database, "jobs", [kept | row for row in part])
        _insert(
            database, "events", [_event(row["id"], kind) for row in part for kind in ("state", "progress", "state")]
        )


def _event(job: str, kind: str) -> dict[str, Any]:
    return {"job": job, "kind": kind, "data": json.dumps({"id": job, "state": "running", "fraction": 0.5}), "at": 1e9}


def _insert(database: Database, table: str, rows: Sequence[dict[str, Any]]) -> None:
    columns = list(rows[0])
    sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    with database.write() as connection:
        connection.executemany(sql, [[row[column] for column in columns] for row in rows])


def quantiles(taken: Sequence[float]) -> dict[str, Any]:
    """Number, median and 99th percentile of requests, in milliseconds."""
    cuts = statistics.quantiles(taken, n=100)
    return {"times": len(taken), "median_ms": round(1e3 * cuts[49], 1), "p99_ms": round(1e3 * cuts[98], 1)}


def questions(newest: int, chance: random.Random) -> dict[str, tuple[str, dict[str, str]]]:
    """Requests for lists: path with parameters, and headers."""
    page = {"Accept": "text/html"}
    return {
        "health": ("/v1/health", {}),
        "list": ("/v1/jobs", {}),
        "list_by_state": (f"/v1/jobs?state={chance.choice(ENDED)}", {}),
        "list_queued": ("/v1/jobs?state=queued", {}),
        "list_deep": (f"/v1/jobs?before={chance.randrange(newest // 2)}", {}),
        "search": (f"/v1/jobs?search=model-{chance.randrange(40)} at {chance.randrange(20, 100)}", {}),
        "search_nothing": ("/v1/jobs?search=nothing is called so", {}),
        "queue": ("/v1/queue", {}),
        "page": ("/", page),
        "page_search": ("/?search=model-7 at 5", page),
    }


async def ask_together(address: str, tokens: Sequence[str], *, newest: int, seconds: float) -> dict[str, list[float]]:
    """All users ask, each after its time of thinking; return the seconds of each request by kind."""
    taken: dict[str, list[float]] = {name: [] for name in questions(newest, random.Random(0))}
    over = time.monotonic() + seconds

    async def use(number: int, token: str) -> None:
        chance = random.Random(number)
        known = {"Authorization": f"Bearer {token}", "X-Forwarded-For": f"10.0.0.{number}"}
        async with httpx.AsyncClient(base_url=address, headers=known) as http:
            await asyncio.sleep(chance.uniform(0, THINKING))
            while time.monotonic() < over:
                kind = chance.choice(list(taken))
                path, headers = questions(newest, chance)[kind]
                begin = time.perf_counter()
                answer = await http.get(path, headers=headers, timeout=60)
                taken[kind].append(time.perf_counter() - begin)
                assert answer.status_code == 200, answer.text
                await asyncio.sleep(THINKING)

    await asyncio.gather(*(use(number, token) for number, token in enumerate(tokens)))
    return taken


def ask_alone(address: str, token: str, *, newest: int) -> dict[str, Any]:
    """One user asks one request after the other; idle requests in between say what the machine gives."""
    chance = random.Random(1)
    taken: dict[str, list[float]] = {name: [] for name in questions(newest, random.Random(0))}
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}) as http:
        for _ in range(40):
            for kind, (path, headers) in questions(newest, chance).items():
                begin = time.perf_counter()
                http.get(path, headers=headers).raise_for_status()
                taken[kind].append(time.perf_counter() - begin)
    return {kind: quantiles(found) for kind, found in taken.items()}


@contextlib.contextmanager
def filled_service(folder: Path, database_url: str | None, *, jobs: int) -> Iterator[tuple[Settings, int, list[str]]]:
    """Run a service with all jobs; yields its settings, its process id and the users' tokens."""
    fake = (sys.executable, str(Path(__file__).parents[2] / "tests" / "helpers" / "fake_run.py"))
    settings = Settings(
        data_dir=folder / "data", database_url=database_url, port=free_port(), command=fake, slots=RUNNING,
        memory_limit=None, trusted_proxies=("127.0.0.1/32",), rate=1e6, burst=10**6, max_queued=10**6,
    )  # fmt: skip
    settings.prepare()
    database = open_database(settings)
    database.migrate()
    process = start(settings)
    try:
        with Client(f"http://127.0.0.1:{settings.port}") as client:
            for number in range(RUNNING):
                client.submit(f"# fake pause 3600\n# fake n {number}\n{_RECIPE}")
            wait_for(lambda: client.page(limit=1).counts["running"] == RUNNING)
        fill(database, jobs - RUNNING, live=LIVE - RUNNING)
        if isinstance(database, PostgresqlDatabase):
            with database.using() as connection:
                connection.execute("VACUUM ANALYZE")  # as autovacuum does within a minute
        tokens = [Tokens(database).create(f"user-{number}", "user") for number in range(USERS)]
        yield settings, process.pid, tokens
    except BaseException:
        print((folder / "serve.log").read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait()


def measure_one(folder: Path, database_url: str | None, *, arguments: argparse.Namespace) -> dict[str, Any]:
    """Lists on one database: alone, and of all users together."""
    with filled_service(folder, database_url, jobs=arguments.jobs) as (settings, pid, tokens):
        address, database = f"http://127.0.0.1:{settings.port}", open_database(settings)
        newest = JobStore(database).page(JobQuery(None, limit=1)).jobs
        assert newest, "the table is filled"
        last = int(database.read("SELECT max(seq) AS last FROM jobs")[0]["last"])
        figures: dict[str, Any] = {"load_average_before": round(os.getloadavg()[0], 1)}
        figures["alone"] = ask_alone(address, tokens[0], newest=last)
        of_service, of_supervisor = psutil.Process(pid), psutil.Process(supervisor_of(pid))
        before = [sum(process.cpu_times()[:2]) for process in (of_service, of_supervisor)]
        begin = time.monotonic()
        taken = asyncio.run(ask_together(address, tokens, newest=last, seconds=arguments.seconds))
        lasted = time.monotonic() - begin
        after = [sum(process.cpu_times()[:2]) for process in (of_service, of_supervisor)]
        figures["together"] = {kind: quantiles(found) for kind, found in taken.items()}
        lists = [one for kind, found in taken.items() if kind not in ("health", "queue") for one in found]
        idle = statistics.median(taken["health"])
        figures["all_lists"] = quantiles(lists) | {"median_per_idle_request": round(statistics.median(lists) / idle, 1)}
        figures["requests_per_second"] = round(sum(map(len, taken.values())) / lasted, 1)
        used = [round(late - early, 2) for early, late in zip(before, after, strict=True)]
        figures["processor_ms_per_request"] = round(1e3 * used[0] / sum(map(len, taken.values())), 1)
        figures["processor_share_of_supervisor"] = round(used[1] / lasted, 3)
        figures["load_average_after"] = round(os.getloadavg()[0], 1)
    return figures


def measure_scale(folder: Path, arguments: argparse.Namespace) -> None:
    """50 users ask for lists of 100,000 jobs, on both databases."""
    figures: dict[str, Any] = {"users": USERS, "live_jobs": LIVE, "jobs_in_table": arguments.jobs}
    # chrt -r 10 python …: other programs on a busy machine take no part
    figures["real_time_priority"] = os.sched_getscheduler(0) == os.SCHED_RR
    for kind in arguments.databases.split(","):
        place = folder / kind
        place.mkdir()
        url = server().new_database(migrated=False) if kind == "postgresql" else None
        figures[kind] = measure_one(place, url, arguments=arguments)
        print(kind, json.dumps(figures[kind]["all_lists"]), flush=True)
    remove_server()
    if arguments.jobs == IN_TABLE:
        record("service-scale", figures)
    else:
        print(json.dumps(figures, indent=1))
