"""The command ``check``: what the next tools make of a checkpoint on this machine. Bodies import late."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmprune.cli.options import Json, console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmprune.evaluation.next_tools.run_checks import Outcome

_STYLES = {"works": "bold green", "fails": "bold red"}  # of the others: dim


def check(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or of a finished run.")],
    *,
    only: Annotated[
        list[str] | None, typer.Option(metavar="TOOL", help="Check this tool alone, such as peft; may be repeated.")
    ] = None,
    time_limit: Annotated[float, typer.Option(min=1, help="Maximum seconds of each check.")] = 900,
    as_json: Json = False,
) -> None:
    """Check what transformers, llama.cpp, vLLM, peft, quantisers and lm-eval make of a model; exit with 1 if one fails.

    Each tool is tried in a process of its own. Of a run folder lm-eval's scores are compared with the report.
    """
    from llmprune.evaluation.next_tools.run_checks import Checkpoint, chosen_checks, run_checks

    checkpoint, checks = Checkpoint.at(model), chosen_checks(only or [])
    outcomes = []
    for outcome in run_checks(checkpoint, checks, time_limit=time_limit):
        outcomes.append(outcome)
        if not as_json:
            _print(outcome, width=max(len(one.name) for one in checks))
    if as_json:
        typer.echo(json.dumps({"model": str(checkpoint.folder), "checks": [asdict(one) for one in outcomes]}, indent=1))
    raise typer.Exit(_code(outcomes))


def _code(outcomes: Sequence[Outcome]) -> int:
    """Return the exit code: 1 if a tool fails."""
    return int(any(outcome.state == "fails" for outcome in outcomes))


def _print(outcome: Outcome, *, width: int) -> None:
    """Print one row, as soon as it is known."""
    from rich.text import Text

    style = _STYLES.get(outcome.state, "dim")
    row = Text.assemble(f"{outcome.tool:<{width}}  ", (f"{outcome.state}: ", style), outcome.told)
    console().print(row, soft_wrap=True)
