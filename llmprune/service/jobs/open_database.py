"""Choice of the service's database by its settings."""

from __future__ import annotations

from llmprune.service.jobs.database import Database
from llmprune.service.jobs.sqlite import SqliteDatabase
from llmprune.service.settings import Settings


def open_database(settings: Settings) -> Database:
    """Return the database that the settings name. Raises RecipeError where its client is not installed."""
    if settings.database_url is None:
        return SqliteDatabase(settings.database)
    from llmprune.service.jobs.postgresql import PostgresqlDatabase  # an extra

    return PostgresqlDatabase(settings.database_url)
