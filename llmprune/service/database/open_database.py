"""Choice of the service's database by its settings."""

from __future__ import annotations

from llmprune.service.database.database import Database
from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.settings import Settings


def open_database(settings: Settings) -> Database:
    """Return the database that the settings name. Raises RecipeError where its client is not installed."""
    if settings.database_url is None:
        return SqliteDatabase(settings.database)
    from llmprune.service.database.postgresql import PostgresqlDatabase

    return PostgresqlDatabase(settings.database_url)


def is_absent(database: Database) -> bool:
    """Return whether a database has no tables; a file is not made."""
    if isinstance(database, SqliteDatabase) and not database.path.exists():
        return True
    return database.version() == 0
