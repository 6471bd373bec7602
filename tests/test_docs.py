"""The README's reference is generated from the code, complete, and up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
from pydantic import BaseModel

from llmprune.cli import reference
from llmprune.cli.reference import command_reference, recipe_reference, write_reference
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.validation_messages import models_in

README = Path(__file__).parent.parent / "README.md"
MARKED = (
    "intro\n<!-- recipe reference -->\nSTALE\n<!-- /recipe reference -->\n\n"
    "<!-- commands -->\n<!-- /commands -->\nend\n"
)


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    """A section and all those inside it."""
    inner = [one for field in model.model_fields.values() for one in models_in(field.annotation)]
    return [model, *(deeper for one in inner for deeper in sections(one))]


def test_readme_has_the_generated_reference() -> None:
    """The README says what the code says; ``python -m llmprune.cli.reference README.md`` writes it."""
    page = README.read_text(encoding="utf-8")
    assert page == write_reference(page)


@pytest.mark.parametrize("section", dict.fromkeys(sections(Recipe)), ids=lambda section: section.__name__)
def test_every_key_is_explained(section: type[BaseModel]) -> None:
    """Each key of a recipe has a description, and a row in the reference."""
    text = recipe_reference()
    for name, field in section.model_fields.items():
        if name != "kind":
            assert field.description, f"{section.__name__}.{name} has no description"
            assert f"{name}`" in text


def test_recipe_reference_says_types_limits_and_defaults() -> None:
    """A row has the path, the type in words with its limits, the default and the meaning."""
    text = recipe_reference()
    assert "| `mlp` | number above 0, at most 1 | none | Fraction of the MLP neurons kept. |" in text
    assert "| `gate.min_retention` | number above 0, at most 1 | required |" in text
    assert "| `max_shard_size` | size, such as `5GB` | `5GB` |" in text
    assert "| `perplexity` | the keys of `calibration` | none |" in text
    assert "| `sources[].weight` | number above 0 | `1.0` |" in text


def test_command_reference() -> None:
    """Commands, arguments and options appear as a person types them, hidden ones do not."""
    app = typer.Typer()

    @app.command()
    def cut(
        recipe: Annotated[Path, typer.Argument(help="The recipe.")],
        output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="The folder.")] = None,
        limit: Annotated[int, typer.Option(help="Most of them.")] = 3,
        fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
        secret: Annotated[bool, typer.Option("--secret", hidden=True)] = False,
    ) -> None:
        """Cut a model."""

    @app.command(hidden=True)
    def inner() -> None:
        """Serve a worker."""

    text = command_reference(app)
    assert "**`llmprune cut RECIPE`**\n\nCut a model.\n" in text
    assert "- `RECIPE`: The recipe.\n- `--output, -o DIR`: The folder.\n" in text
    assert "- `--limit LIMIT`: Most of them. (default: `3`)\n- `--fresh`: Start over." in text
    assert "secret" not in text
    assert "inner" not in text


def test_the_texts_go_between_the_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands between the markers is replaced, the rest of the page stays, and twice is once."""
    monkeypatch.setattr(reference, "command_reference", lambda: "COMMANDS")
    page = write_reference(MARKED)
    assert page.startswith("intro\n<!-- recipe reference -->\n\n**`model`**")
    assert page.endswith("\n\n<!-- commands -->\n\nCOMMANDS\n\n<!-- /commands -->\nend\n")
    assert "STALE" not in page
    assert write_reference(page) == page


@pytest.mark.parametrize("line", ["<!-- recipe reference -->", "<!-- /recipe reference -->", "<!-- /commands -->"])
def test_a_missing_marker_is_named(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page without a marker is an error that shows the marker, and is not touched."""
    monkeypatch.setattr(reference, "command_reference", lambda: "COMMANDS")
    with pytest.raises(ValueError, match=line):
        write_reference(MARKED.replace(line, ""))
