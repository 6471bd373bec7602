"""Drafts of recipes: one for each user, from the first letter until it is submitted or discarded."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmprune.common.schema import format_size
from llmprune.service.database.database import Database
from llmprune.service.recipe_policy.yaml_limits import RECIPE_LIMIT

MAX_DRAFTS = 10_000  # of all users; the oldest are deleted
KEEP_SECONDS = 90 * 86_400.0
_MAX_SETTINGS = 2_000  # bytes


class TooLong(Exception):
    """A draft is longer than what may be submitted."""


@dataclass(frozen=True)
class Draft:
    """A recipe that is being written, and the other fields of its page by name. ``saved``: seconds since 1970."""

    recipe: str
    settings: Mapping[str, str] = field(default_factory=dict)
    saved: float = 0.0


class Drafts:
    """The drafts of all users."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def get(self, owner: str) -> Draft | None:
        """Return a user's draft; None where there is none."""
        rows = self.database.read("SELECT recipe, settings, saved FROM drafts WHERE owner = ?", (owner,))
        return Draft(rows[0]["recipe"], json.loads(rows[0]["settings"]), rows[0]["saved"]) if rows else None

    def save(self, owner: str, draft: Draft) -> None:
        """Store a user's draft in place of the one before. Raises TooLong."""
        settings = json.dumps(dict(draft.settings), ensure_ascii=False)
        if len(draft.recipe.encode()) > RECIPE_LIMIT or len(settings.encode()) > _MAX_SETTINGS:
            raise TooLong(f"it is longer than the {format_size(RECIPE_LIMIT)} that a recipe may have")
        before = self.get(owner)
        if before is not None and (before.recipe, dict(before.settings)) == (draft.recipe, dict(draft.settings)):
            return
        with self.database.write() as connection:
            connection.execute(
                "INSERT INTO drafts (owner, recipe, settings, saved) VALUES (?, ?, ?, ?) ON CONFLICT (owner) DO UPDATE "
                "SET recipe = excluded.recipe, settings = excluded.settings, saved = excluded.saved",
                (owner, draft.recipe, settings, time.time()),
            )
            connection.execute("DELETE FROM drafts WHERE saved < ?", (time.time() - KEEP_SECONDS,))
            oldest = "SELECT owner FROM drafts ORDER BY saved DESC LIMIT 1000 OFFSET ?"
            connection.execute(f"DELETE FROM drafts WHERE owner IN ({oldest})", (MAX_DRAFTS,))

    def discard(self, owner: str) -> None:
        """Delete a user's draft."""
        if self.get(owner) is not None:
            with self.database.write() as connection:
                connection.execute("DELETE FROM drafts WHERE owner = ?", (owner,))

    def submitted_as(self, owner: str, key: str) -> str | None:
        """Return the id of the job that a user's page with this key has submitted; None where there is none."""
        rows = self.database.read("SELECT job FROM idempotency WHERE owner = ? AND key = ?", (owner, key))
        return str(rows[0]["job"]) if rows else None
