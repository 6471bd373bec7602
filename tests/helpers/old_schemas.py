"""Databases of earlier schemas with rows in every table, as SQL text.

    PYTHONPATH=tests python -m helpers.old_schemas NUMBER…

writes the texts of these schemas. Give one of each release, and those whose data a later migration moves. A text that
exists is never written again: it is what that version of llmprune left behind.
"""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any

from llmprune.service.database.schema import steps

FOLDER = Path(__file__).parents[1] / "service" / "schemas"
HOOK = "https://hooks.example.org/secret-of-a-hook"
_STATES = ("queued", "running", "cancelling", "cancelled", "failed", "succeeded")
_FIGURES = {"parameters": [2, 1], "bytes": [4, 2], "layers": [3, 2], "perplexity": [10.5, 11.5], "retention": 0.9}
_RECIPE = "model: {id: org/model}\ncalibration: {dataset: org/text}\ndepth: {remove: 1}\n"


def write(numbers: Collection[int]) -> None:
    """Write the texts of schemas that have none."""
    FOLDER.mkdir(exist_ok=True)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        for step in steps("sqlite"):
            connection.executescript(step.sql)
            if step.number == 1:
                _add_jobs(connection)
            _fill_empty_tables(connection)
            if step.number == 20:
                _add_links(connection)
            path = FOLDER / f"{step.number:04}.sql"
            if step.number in numbers and not path.exists():
                text = "\n".join([*connection.iterdump(), f"PRAGMA user_version = {step.number};"])
                path.write_text(text + "\n", encoding="utf-8")


def _add_jobs(connection: sqlite3.Connection) -> None:
    """Add a job in each state of the first schema."""
    for number, state in enumerate(_STATES):
        ended = state in ("cancelled", "failed", "succeeded")
        row: dict[str, Any] = {
            "id": f"{number:012x}", "owner": ("ann", "bob")[number % 2], "name": f"name ∞ {number}",
            "model": "org/model", "recipe": _RECIPE,
            "overrides": '["depth.remove=2"]', "launcher": "local", "gpus": 0, "priority": -number,
            "time_limit": 0.1, "state": state, "attempts": number, "devices": "[]", "ran_seconds": 1234.0625,
            "exit_code": 1 if state == "failed" else None, "error": "it broke" if state == "failed" else None,
            "figures": json.dumps(_FIGURES) if state == "succeeded" else None, "created": 1.7e9 + 0.125 * number,
            "started": 1.7e9 + 60 if number else None, "finished": 1.7e9 + 90.5 if ended else None,
        }  # fmt: skip
        _insert(connection, "jobs", row)
        event = json.dumps({"id": row["id"], "state": state})
        _insert(connection, "events", {"job": row["id"], "kind": "state", "data": event, "at": 1.7e9})


def _add_links(connection: sqlite3.Connection) -> None:
    """Make jobs of the first schema a follow-up, a push and the user of a base, and add a webhook in clear."""
    queued, running, _, cancelled, _, parent = (f"{number:012x}" for number in range(6))
    work = json.dumps({"kind": "size", "keep": 0.5}, separators=(",", ":"))
    connection.execute("UPDATE jobs SET made_from = ?1, reads = ?1, work = ?2 WHERE id = ?3", (parent, work, queued))
    push = json.dumps({"repo_id": "org/name"})
    connection.execute("UPDATE jobs SET source = ?, push = ? WHERE id = ?", (parent, push, cancelled))
    connection.execute("UPDATE bases SET job = ?, base = ?", (running, parent))
    for table, owner in (("notify_targets", "job"), ("notify_defaults", "owner"), ("outbox", "owner")):
        values = (HOOK, {"job": queued, "owner": "ann"}[owner])
        connection.execute(f"UPDATE {table} SET kind = 'webhook', target = ?, {owner} = ?", values)


def _fill_empty_tables(connection: sqlite3.Connection) -> None:
    """Add a row to every table without one, in an order in which its references exist."""
    pending = [
        (name, sql)
        for name, sql in connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY rowid")
        if not name.startswith("sqlite_") and not connection.execute(f"SELECT 1 FROM {name}").fetchone()
    ]
    while pending:
        name, sql = pending.pop(0)
        row = _row(connection, name, sql=sql)
        if row is None:
            pending.append((name, sql))
        else:
            _insert(connection, name, row)


def _row(connection: sqlite3.Connection, table: str, *, sql: str) -> dict[str, Any] | None:
    """Make a row of a table; None where a table that it references has none yet."""
    parents = {row[3]: (row[2], row[4]) for row in connection.execute(f"PRAGMA foreign_key_list({table})")}
    row: dict[str, Any] = {}
    columns = connection.execute(f"PRAGMA table_info({table})").fetchall()
    is_numbered = sum(1 for *_, key in columns if key) == 1  # then an INTEGER key gets its number by itself
    for _, name, kind, _, _, key in columns:
        choice = re.search(rf"\b{name} IN \('([^']+)'|\b{name} = (\d+)\)", sql)
        if name in parents:
            parent, column = parents[name]
            found = connection.execute(f"SELECT {column or 'rowid'} FROM {parent} LIMIT 1").fetchone()
            if found is None and parent != table:
                return None
            row[name] = found[0] if found else None
        elif choice:
            row[name] = choice[1] or int(choice[2])
        elif not (key and kind == "INTEGER" and is_numbered):
            row[name] = {"TEXT": f"{table} {name}", "INTEGER": 1, "BIGINT": 1, "BLOB": b"\0\1"}.get(kind, 1.5)
    return row


def _insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    marks = ", ".join("?" * len(row))
    connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", [*row.values()])


if __name__ == "__main__":
    write({int(number) for number in sys.argv[1:]})
