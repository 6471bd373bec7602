"""Upgrade of a service's database: the schema, and what SQL alone cannot do. It may be repeated at any time."""

from __future__ import annotations

from llmprune.service.database.database import Database
from llmprune.service.jobs.library.library import Library
from llmprune.service.notifications.cipher import TargetCipher, encrypt_targets
from llmprune.service.settings import Settings


def bring_up_to_date(database: Database, settings: Settings) -> None:
    """Migrate the schema, complete the library and encrypt targets. Raises OutputError for a newer schema."""
    database.migrate()
    Library(database).complete()
    encrypt_targets(database, TargetCipher(settings.data_dir))
