"""The commands ``push`` and ``inspect``, for models on the hub. Bodies import late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli.options import FinishedFolder, Json, console
from llmprune.common.files import require_file, write_text
from llmprune.common.libraries import import_libraries
from llmprune.common.printing import printable


def push(
    run: FinishedFolder,
    repo_id: Annotated[
        str | None, typer.Option(help="Repository, such as org/name; default: that of the recipe's hub section.")
    ] = None,
    *,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository; default: private.")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Branch that gets the commit; default: main.")] = None,
    create_pr: Annotated[
        bool | None, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = None,
    when: Annotated[
        str | None, typer.Option(help="always: push even if the gate was not passed; the card says so.")
    ] = None,
    commit_message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    quantized_repo_id: Annotated[
        str | None,
        typer.Option(help="Repository for the quantized result, such as org/name-fp8; auto: named like that."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="JSON file to write repository, commit and address of the push to.")
    ] = None,
) -> None:
    """Push the model of a finished run to the hub, with its card and provenance."""
    settings: dict[str, object] = {"repo_id": repo_id, "private": private, "branch": branch, "create_pr": create_pr}
    settings |= {"when": when, "commit_message": commit_message, "quantized_repo_id": quantized_repo_id}
    if save:
        require_file(save, option="--save", example="published.json")
    import_libraries(announced=False)
    from llmprune.publish.push import push_run

    published = push_run(run, settings)
    if save:
        write_text(save, published.model_dump_json(indent=1) + "\n")
    for one in filter(None, (published, published.quantized)):
        typer.echo(f"pushed {one.files} files to {one.repo_id}\n{printable(one.url)}")


def inspect(
    place: Annotated[str, typer.Argument(metavar="MODEL", help="ORG/NAME, ORG/NAME@REVISION, or a folder.")],
    as_json: Json = False,
) -> None:
    """Print the origin of a pushed model, and check its files against its record."""
    import_libraries(announced=False)
    from llmprune.publish.provenance import differing_files, fetch_record, parse_hub_address
    from llmprune.publish.show import print_record

    record, commit = fetch_record(place)
    if as_json:
        typer.echo(json.dumps(record.model_dump(mode="json"), indent=1))
    else:
        differing = differing_files(parse_hub_address(place)[0], commit, record=record) if commit else None
        print_record(place, commit, record=record, differing=differing, console=console())
