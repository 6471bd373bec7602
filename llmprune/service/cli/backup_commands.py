"""The commands that back up and restore the job table. Bodies import late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmprune.service.cli.database_option import DatabaseUrl, database_url
from llmprune.service.cli.serve_options import DataDir

if TYPE_CHECKING:
    from llmprune.service.backup.archive import Manifest


def backup(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Backup to write, such as jobs.tar.gz.")
    ],
    *,
    data_dir: DataDir = Path("runs/service"),
    database: DatabaseUrl = None,
    with_reports: Annotated[
        bool, typer.Option("--with-reports", help="Also save recipes, reports, scores and cuts of all jobs.")
    ] = False,
) -> None:
    """Back up the job table of a service, which may run meanwhile. Models are not part of it."""
    from llmprune.service.backup.make import back_up
    from llmprune.service.data_folder import usable
    from llmprune.service.database.open_database import open_database
    from llmprune.service.settings import Settings

    settings = Settings(data_dir=data_dir, database_url=database_url(database))
    with usable(settings):
        made = back_up(settings, open_database(settings), output=output, with_reports=with_reports)
    typer.echo(f"{output}: {_contents(made)}")


def restore(
    backup: Annotated[Path, typer.Argument(metavar="FILE", help="Backup that llmprune backup wrote.")],
    *,
    data_dir: DataDir = Path("runs/service"),
    database: DatabaseUrl = None,
) -> None:
    """Restore a backup into an empty job table, on SQLite or PostgreSQL. No service may run on it."""
    from llmprune.service.backup.restore import restore as restore_into
    from llmprune.service.data_folder import locked, usable
    from llmprune.service.database.open_database import open_database
    from llmprune.service.settings import Settings

    settings = Settings(data_dir=data_dir, database_url=database_url(database))
    with usable(settings):
        opened = open_database(settings)
        settings.prepare()
        with locked(settings.data_dir), opened.only_service():
            restored = restore_into(settings, opened, backup=backup)
    typer.echo(f"{opened.place}: {_contents(restored)}")


def _contents(manifest: Manifest) -> str:
    """Return a line for people about the contents of a backup."""
    from llmprune.results.formatting import plural

    jobs, files = plural(manifest.tables["jobs"], "job"), plural(manifest.job_files, "file")
    return f"{jobs} and {files} of jobs, schema {manifest.schema_version}, {manifest.created}"
