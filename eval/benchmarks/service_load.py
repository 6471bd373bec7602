"""The service under load: submissions at once, and requests while the table holds many jobs."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sqlite3
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import record
from helpers.service import free_port, start
from service_requests import submit_under, wait_for

from llmprune.service.client.calls import Call
from llmprune.service.client.sync.client import Client
from llmprune.service.jobs.job import JobSummary
from llmprune.service.settings import Settings

CLIENTS, SUBMISSIONS, IN_TABLE = 20, 200, 10_000


def fill_table(settings: Settings, template: str) -> None:
    """Copy an ended job with its events until the table holds IN_TABLE jobs."""
    columns = [name for name in JobSummary.model_fields if name != "id"] + ["recipe", "overrides"]
    names = ", ".join(columns)
    copies = "WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
    with contextlib.closing(sqlite3.connect(settings.database)) as connection, connection:
        connection.execute(
            f"{copies} INSERT INTO jobs (id, {names}) SELECT printf('%012x', i), {names} FROM n, jobs WHERE id = ?",
            (IN_TABLE, template),
        )
        connection.execute(
            f"{copies} INSERT INTO events (job, kind, data, at) "
            "SELECT printf('%012x', i), kind, data, at FROM n, events WHERE job = ?",
            (IN_TABLE, template),
        )


def milliseconds(ask: Callable[[], object]) -> float:
    """Duration of a request in milliseconds."""
    begin = time.perf_counter()
    ask()
    return 1e3 * (time.perf_counter() - begin)


def summary(taken: list[float]) -> dict[str, Any]:
    """Median and 95th percentile of many requests, in milliseconds."""
    cuts = statistics.quantiles(taken, n=20)
    return {"times": len(taken), "median_ms": round(cuts[9], 1), "p95_ms": round(cuts[18], 1)}


def measure_load(folder: Path, _: argparse.Namespace) -> None:
    """200 submissions at once through 20 clients, each sent twice; list and show with 10,000 jobs in the table."""
    fake = (sys.executable, str(Path(__file__).parents[2] / "tests" / "helpers" / "fake_run.py"))
    # what is measured is the service, not its limit of requests for each caller
    settings = Settings(data_dir=folder / "data", port=free_port(), command=fake, rate=1e6, burst=10**6)
    busy = os.getloadavg()[0]  # what others do on this machine
    server = start(settings)
    try:
        with Client(f"http://127.0.0.1:{settings.port}") as client:
            template = client.submit(load_recipe(0)).id
            wait_for(lambda: client.job(template).state == "succeeded")
            fill_table(settings, template)
            figures: dict[str, Any] = {"load_average_before": round(busy, 1)}
            figures |= {"jobs_in_table": sum(client.page().counts.values()), "alone": ask_all(client, template)}
            figures["submissions"] = submit_at_once(client, template)
            figures["with_them_in_the_queue"] = ask_all(client, template)
    finally:
        server.terminate()
        server.wait()
    record("service-load", figures)


def ask_all(client: Client, job: str) -> dict[str, Any]:
    """Requests that people and pages send all the time."""
    newest = client.page(limit=1).next or 0
    questions: dict[str, Callable[[], object]] = {
        "show": lambda: client.job(job),
        "list": client.page,
        "list_deep": lambda: client.page(before=newest - 5_000),
        "list_by_state": lambda: client.page(state=["succeeded"]),
        "search": lambda: client.page(search="nothing is called so"),
        "queue": client.queue,
        "page": lambda: client.connection.answer(Call("GET", "/", str)),
    }
    return {name: summary([milliseconds(ask) for _ in range(100)]) for name, ask in questions.items()}


def submit_at_once(client: Client, job: str) -> dict[str, Any]:
    """Every client sends its share, each submission twice under one key, while another one lists and shows."""
    before = sum(client.page().counts.values())
    texts = [load_recipe(number) for number in range(1, SUBMISSIONS + 1)]
    ready, taken, answered, lists, shows = threading.Barrier(CLIENTS + 1), [], [], [], []

    def send(part: list[str]) -> None:
        with Client(client.server) as own:
            ready.wait()
            for text in part:
                key = hashlib.sha256(text.encode()).hexdigest()
                ids = []
                for _ in range(2):
                    taken.append(milliseconds(lambda: ids.append(submit_under(own, key, text))))  # noqa: B023  # called at once
                answered.append((text, *ids))

    threads = [threading.Thread(target=send, args=(texts[number::CLIENTS],)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    ready.wait()
    begin = time.perf_counter()
    while any(thread.is_alive() for thread in threads):
        lists.append(milliseconds(client.page))
        shows.append(milliseconds(lambda: client.job(job)))
    for thread in threads:
        thread.join()
    lasted = time.perf_counter() - begin
    there = {found.id: client.job(found.id).refresh().recipe for found in client.page(limit=500).jobs[:SUBMISSIONS]}
    return {
        "clients": CLIENTS,
        "sent": len(texts),
        "sent_again_under_the_same_key": len(texts),
        "seconds": round(lasted, 2),
        "submit": summary(taken),
        "list_meanwhile": summary(lists),
        "show_meanwhile": summary(shows),
        "added": sum(client.page().counts.values()) - before,
        "lost": sum(there.get(first) != text for text, first, _ in answered) + len(texts) - len(answered),
        "doubled": len(there) - len(set(there.values())) + sum(first != second for _, first, second in answered),
    }


def load_recipe(number: int) -> str:
    """A recipe that no other number gives, for a fake run that takes no time."""
    return f"# number {number}\nmodel: {{id: org/model}}\ncalibration: {{dataset: org/text}}\ndepth: {{remove: 1}}\n"
