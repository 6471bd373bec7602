"""Copies of all tables between PostgreSQL and an SQLite file of the same schema."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from psycopg import IsolationLevel, sql

from llmprune.service.backup.archive import names
from llmprune.service.database.postgresql import PostgresqlDatabase
from llmprune.service.database.schema import steps
from llmprune.service.jobs.store_reads import placeholders

_ROWS = 1_000  # in memory at a time


def copy_to_file(database: PostgresqlDatabase, path: Path) -> None:
    """Copy all tables, as they are at one instant, into a new SQLite file."""
    with database.using() as source, closing(sqlite3.connect(path)) as target:
        source.isolation_level, source.read_only = IsolationLevel.REPEATABLE_READ, True
        with source.transaction():
            version = database.version_in(source)
            for step in steps("sqlite"):
                if step.number <= version:
                    target.executescript(step.sql)
            target.execute(f"PRAGMA user_version = {version}")
            for table, columns in _in_order(target):
                marks = placeholders(columns)
                query = sql.SQL("SELECT {} FROM {}").format(_listed(columns), sql.Identifier(table))
                with source.cursor(name="backup") as cursor:
                    cursor.itersize = _ROWS
                    rows = (tuple(row.values()) for row in cursor.execute(query))
                    target.executemany(f'INSERT INTO "{table}" ({_quoted(columns)}) VALUES ({marks})', rows)
            target.commit()


def copy_from_file(path: Path, database: PostgresqlDatabase) -> None:
    """Copy all tables of an SQLite file of the current schema into empty ones, in one transaction."""
    with closing(sqlite3.connect(path)) as source, database.using() as target, target.transaction():
        source.text_factory = lambda text: text.decode("utf-8", "replace")
        for table, columns in _in_order(source):
            command = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(table), _listed(columns))
            with target.cursor() as cursor, cursor.copy(command) as copy:
                for row in source.execute(f'SELECT {_quoted(columns)} FROM "{table}"'):
                    copy.write_row(row)
        _continue_numbers(target)


def has_rows(database: PostgresqlDatabase) -> bool:
    """Return whether a table of the service has a row."""
    with database.using() as connection:
        tables = connection.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() AND tablename <> 'schema_version'"
        ).fetchall()
        return any(
            connection.execute(sql.SQL("SELECT 1 FROM {} LIMIT 1").format(sql.Identifier(row["tablename"]))).fetchone()
            for row in tables
        )


def _continue_numbers(connection: Any) -> None:
    """Let numbers that PostgreSQL gives go on after the highest one that was copied."""
    found = connection.execute(
        "SELECT table_name AS t, column_name AS c FROM information_schema.columns "
        "WHERE table_schema = current_schema() AND is_identity = 'YES'"
    ).fetchall()
    for row in found:
        table, column = sql.Identifier(row["t"]), sql.Identifier(row["c"])
        highest = sql.SQL("SELECT coalesce(max({}), 0) + 1 FROM {}").format(column, table)
        number = sql.SQL("SELECT setval(pg_get_serial_sequence({}, {}), ({}), false)")
        connection.execute(number.format(sql.Literal(row["t"]), sql.Literal(row["c"]), highest))


def _in_order(connection: sqlite3.Connection) -> Iterator[tuple[str, list[str]]]:
    """Return the tables and their columns; a table comes after those that it references."""
    needs = {
        table: {row[2] for row in connection.execute(f'PRAGMA foreign_key_list("{table}")')} - {table}
        for table in names(connection)
    }
    for table in TopologicalSorter(needs).static_order():
        yield table, [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]


def _quoted(columns: list[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def _listed(columns: list[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, columns))
