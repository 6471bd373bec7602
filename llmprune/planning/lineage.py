"""Find the models that a model was pruned from, by the record that llmprune leaves with it.

A run folder has ``report.json`` beside ``model``, a pushed model has ``llmprune.json`` with the same figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from llmprune.checkpoint.download import fetch, names_of
from llmprune.checkpoint.location import conversion_of, hub_commit, is_on_hub
from llmprune.common.errors import LLMPruneError, RecipeError
from llmprune.common.files import read_json
from llmprune.recipe.model import FIRST_BASE, ModelSource
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.lineage import Ancestor

_PUSHED, _OF_RUN = "llmprune.json", "report.json"


class _Figures(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Size(_Figures):
    parameters: int


class _Provenance(_Figures):
    model: str
    commit: str | None


class _Report(_Figures):
    """The part of a report that names the models it was made from."""

    provenance: _Provenance
    dense: _Size
    lineage: tuple[Ancestor, ...] = ()


def ancestors_of(source: ModelSource) -> tuple[Ancestor, ...]:
    """Return the models that a model was pruned from, the first base first; none where no record says so."""
    found = _record(source)
    if found is None:
        return ()
    try:
        report = _Report.model_validate(found)
    except ValidationError:  # of another version, or damaged: the model is pruned all the same
        return ()
    own = report.provenance
    return report.lineage or (Ancestor(name=own.model, commit=own.commit, parameters=report.dense.parameters),)


def lineage_of(source: ModelSource, parameters: int) -> tuple[Ancestor, ...]:
    """Return the models from the first base to the one that is pruned now, which has ``parameters``."""
    own = Ancestor(name=source.id, commit=hub_commit(source), parameters=parameters)
    return (*ancestors_of(source), own)


def settle_first_base(recipe: Recipe, lineage: tuple[Ancestor, ...] = ()) -> Recipe:
    """Return the recipe with the hub id of the first base in place of ``against: first_base``.

    ``lineage``: that of a finished run, which names it; else the record of the model does. Raises RecipeError where no
    record names one on the hub.
    """
    settled: dict[str, Any] = {}
    for name in ("recover", "evaluation"):
        section = getattr(recipe, name)
        if section is not None and section.against == FIRST_BASE:
            first = _first_base(recipe.model, lineage or ancestors_of(recipe.model), key=f"{name}.against")
            update = {"against": first.name, "against_revision": first.commit}
            settled[name] = section.model_copy(update=update)
    return recipe.with_chosen(settled) if settled else recipe


def _first_base(source: ModelSource, found: tuple[Ancestor, ...], *, key: str) -> Ancestor:
    if not found:
        raise RecipeError(
            f"{key}: no record of llmprune in the folder or repository of {source.id} says what it was pruned from "
            f"({_PUSHED}, or {_OF_RUN} of its run); give the hub id or folder of that model"
        )
    if found[0].commit is None:
        raise RecipeError(
            f"{key}: {source.id} was first pruned from {found[0].name}, which is not on the hub, and a name in a "
            f"record is followed only there; set {key} to its folder"
        )
    return found[0]


def _record(source: ModelSource) -> Any:
    """Return the figures of the run that made a model, as JSON data; None where there are none."""
    folder = Path(source.id).expanduser()
    try:
        if conversion_of(source) is not None:
            return None
        if is_on_hub(source):
            if _PUSHED not in names_of(source.id, source.revision):
                return None
            folder = fetch(source.id, source.revision, names=[_PUSHED])
    except LLMPruneError:  # loading the model says what is wrong
        return None
    pushed = _read(folder / _PUSHED)
    if pushed is not None:
        return pushed.get("report")
    return _read(folder.absolute().parent / _OF_RUN) if folder.absolute().name == "model" else None


def _read(path: Path) -> dict[str, Any] | None:
    found = read_json(path)
    return found if isinstance(found, dict) else None
