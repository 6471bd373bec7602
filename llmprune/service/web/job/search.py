"""Search of a job as its page shows it: the frontier as it is found, and the recipe of each of its shapes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from pydantic import ValidationError

from llmprune.common.errors import RecipeError
from llmprune.recipe.yaml_reader import dump, read
from llmprune.report.html.search_section import SearchView, view_search
from llmprune.results.figures.search import SearchFigures, TriedShape
from llmprune.results.run_folder.products import SEARCH, SEARCH_SO_FAR
from llmprune.results.shape_recipe import KeptUnits, sections_of_shape
from llmprune.service.api.dependencies import Service

_MOST_BYTES = 4_000_000  # of the figures


@dataclass(frozen=True)
class JobSearch:
    """Figures of a job's search. ``seen``: changes with them."""

    figures: SearchFigures
    seen: str

    def view(self, job: str) -> SearchView:
        """Return the chart and tables, whose shapes lead to the editor."""
        return view_search(self.figures, link=lambda shape: address_of(job, shape))


def search_of(service: Service, job: str) -> JobSearch | None:
    """Return the search of a job, finished or as far as it is; None where there is none, or it cannot be read."""
    folder = service.settings.run_folder(job)
    for name in (SEARCH, SEARCH_SO_FAR):
        try:
            text = _read(folder / name)
            figures = SearchFigures.model_validate_json(service.paths.hide(text))
        except (OSError, ValueError, ValidationError):  # absent, or the run is just writing it
            continue
        if figures.tried:
            return JobSearch(figures, hashlib.sha256(text.encode()).hexdigest()[:12])
    return None


def has_budget(text: str) -> bool:
    """Return whether a recipe has a budget."""
    try:
        data = read(text).data
    except RecipeError:
        return False
    return isinstance(data, dict) and data.get("budget") is not None


def _read(path: Path) -> str:
    """Read a text. Raises OSError and ValueError, the latter for one that is too long."""
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path} is longer than {_MOST_BYTES} bytes")
    return data.decode("utf-8")


def address_of(job: str, shape: TriedShape) -> str:
    """Return the address of the editor with the recipe of a shape."""
    return f"/submit?{urlencode({'again': job, 'shape': shape.name, 'size': shape.size})}"


def recipe_of_shape(text: str, found: SearchFigures, *, name: str, size: int) -> str | None:
    """Return a job's recipe with the numbers of a shape in place of its budget; None where no such shape was tried.

    Raises RecipeError where the recipe cannot be read.
    """
    shape = next((one for one in found.tried if (one.name, one.size) == (name, size)), None)
    data = read(text).data
    if shape is None or not isinstance(data, dict):
        return None
    budget, kept = data.pop("budget", None), KeptUnits.of_tried(found, shape)
    axes = budget.get("axes") if isinstance(budget, dict) else None
    return dump(data | sections_of_shape(kept, axes=axes if isinstance(axes, dict) else {}))
