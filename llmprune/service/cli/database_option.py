"""The option that puts the job table into PostgreSQL, for the commands that open it themselves."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from llmprune.common.errors import RecipeError

DATABASE_VARIABLE = "LLMPRUNE_DATABASE"
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        help="PostgreSQL database of the job table, such as postgresql://USER@HOST/NAME. "
        f"Default: the variable {DATABASE_VARIABLE}, else a file in the data folder.",
    ),
]


def database_url(given: str | None) -> str | None:
    """Return the address of the database, None for a file in the data folder.

    A password in the variable's address is passed on in PGPASSWORD, which libpq reads. Raises RecipeError.
    """
    source, url = ("--database", given) if given else (DATABASE_VARIABLE, os.environ.get(DATABASE_VARIABLE))
    if not url:
        return None
    if not url.startswith(("postgresql://", "postgres://")):
        raise RecipeError(f"{source}: give an address such as postgresql://USER@HOST/NAME, or leave it out for a file")
    from llmprune.service.database.postgresql import without_password

    address, password = without_password(url, source=source)
    if password is not None and given:
        raise RecipeError(
            "--database: every user of this machine can read a password on the command line; put it into ~/.pgpass or "
            f"PGPASSWORD, or give the whole address in the variable {DATABASE_VARIABLE}"
        )
    if password is not None:
        os.environ["PGPASSWORD"] = password
    return address
