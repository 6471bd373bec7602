"""The command ``search``: the shapes that a budget allows, tried and compared, without a cut. Bodies import late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llmprune.cli.options import Json, Overrides, RecipePlace, RunFolderOption, console
from llmprune.cli.run_commands import default_folder, load_recipe, run_on_every_gpu
from llmprune.common.errors import RecipeError
from llmprune.common.libraries import import_libraries
from llmprune.common.progress import lines_without_terminal
from llmprune.results.run_folder.output_path import require_run_folder

if TYPE_CHECKING:
    from llmprune.results.figures.search import SearchFigures


def search(
    recipe: RecipePlace,
    output: RunFolderOption = None,
    *,
    context: typer.Context,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Find the best shape within a budget and stop: nothing is cut. `llmprune run` on the same folder continues."""
    parsed, _ = load_recipe(recipe, overrides)
    if parsed.budget is None:
        raise RecipeError(
            "has no section budget, so there is no shape to search for; add one, such as budget: {parameters: 0.75}, "
            "or prune with llmprune run",
            recipe,
        )
    folder = output or default_folder(recipe)
    require_run_folder(folder)
    import_libraries(announced=not as_json)
    if context.obj is not None and run_on_every_gpu(context.obj, parsed, halves=False):
        return
    from llmprune.common.distributed import is_first_process, leave_process_group
    from llmprune.pipeline.run import search_only

    with lines_without_terminal():
        found = search_only(parsed, folder)
    if is_first_process():
        show_search(found, folder, recipe=recipe, as_json=as_json)
    leave_process_group()


def show_search(found: SearchFigures, folder: Path, *, recipe: str, as_json: bool) -> None:
    """Print the figures of a search, where its page is, and how to continue."""
    from llmprune.report.search_table import print_search
    from llmprune.results.run_folder.products import FRONTIER
    from llmprune.results.run_folder.replacing import NEXT

    page = next(path for path in (folder / NEXT / FRONTIER, folder / FRONTIER) if path.is_file())
    if as_json:
        typer.echo(json.dumps(found.model_dump(mode="json"), indent=1))
    else:
        print_search(found, console())
    typer.echo(f"\nchart    {page}\ncontinue llmprune run {recipe} -o {folder}", err=as_json)
