"""The commands ``report`` and ``compare``, which read the reports of finished runs. Bodies import late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli.options import Json, console
from llmprune.common.printing import printable


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or its report.json.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the page; default: report.html in the folder.")
    ] = None,
) -> None:
    """Build a run's page again from its report.json, and print its table."""
    from llmprune.common.files import require_file, write_text
    from llmprune.report.html.page import render_page
    from llmprune.report.run_table import print_summary
    from llmprune.results.load_report import load_report

    found = load_report(run_folder)
    page = output or (run_folder if run_folder.is_dir() else run_folder.parent) / "report.html"
    require_file(page, option="--output", example="report.html")
    write_text(page, render_page(found))
    print_summary(found, console())
    typer.echo(f"written to {page}")


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs; others are named and left out.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for a page that plots size against retention.")
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Compare several runs: size, retention, perplexity, speed."""
    from llmprune.common.files import require_file, write_text
    from llmprune.report.html.compare_page import render_comparison
    from llmprune.report.runs import figures_of, load_runs
    from llmprune.report.runs_table import print_runs

    if output is not None:
        require_file(output, option="--output", example="compare.html")
    found, skipped = load_runs(runs)
    for reason in skipped:
        typer.echo(f"llmprune: left out: {printable(reason)}", err=True)
    if as_json:
        typer.echo(json.dumps(figures_of(found), indent=1))
    else:
        print_runs(found, console())
    if output is not None:
        write_text(output, render_comparison(found))
        typer.echo(f"written to {output}", err=as_json)
