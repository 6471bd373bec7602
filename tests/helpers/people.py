"""A service with users, and a Python client for each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx

from helpers.service import BASE, ServiceHarness
from llmprune import AsyncClient
from llmprune.service.client.sync.client import Client


class People:
    """A service with users, and a client for each."""

    def __init__(self, folder: Path) -> None:
        self.harness = ServiceHarness(folder, rate=1e6, burst=10**6, slots=2)
        self.service, self.database = self.harness.service, self.harness.service.database
        self.tokens: dict[str, str] = {}

    def client(self, name: str, role: Any = "user") -> Client:
        """A client of a user, who is made where there is none."""
        if name not in self.tokens:
            self.tokens[name] = self.service.tokens.create(name, role)
        made = self.harness.client(pause=lambda _: None)
        made.connection.http.headers["Authorization"] = f"Bearer {self.tokens[name]}"
        return made

    def rows(self, owner: str) -> dict[str, int]:
        """The number of rows of each table that name a user; with SQLite every table is looked at."""
        if self.database.kind != "SQLite":
            return {}
        found = self.database.read("SELECT name FROM sqlite_master WHERE type = 'table'")
        tables = [row["name"] for row in found]
        counts = {}
        for table in tables:
            columns = {row["name"] for row in self.database.read(f"PRAGMA table_info({table})")}
            if "owner" in columns:
                sql = f"SELECT count(*) AS n FROM {table} WHERE owner = ?"
                counts[table] = self.database.read(sql, (owner,))[0]["n"]
        return {table: count for table, count in counts.items() if count}

    def asynchronous(self, name: str, work: Callable[[AsyncClient], Any]) -> Any:
        """Run a coroutine with an asynchronous client of a user."""

        async def run() -> Any:
            transport = httpx.ASGITransport(app=self.harness.app)
            async with AsyncClient(BASE, self.tokens[name], transport=transport) as client:
                return await work(client)

        return asyncio.run(run())
