"""Reproduction of a pushed model from its provenance file: ``llmprune run hub://org/name@rev``.

Model and data are pinned to the recorded commits, windows that the dense model wrote itself are those that were
published (``generated_windows``), a shape that was searched is the recorded one, and nothing is pushed. The new result
is compared with the recorded one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llmprune.common.errors import HubError, RecipeError
from llmprune.common.files import sha256_of
from llmprune.common.nested import value_at
from llmprune.common.paths import is_plain_path
from llmprune.publish.provenance import SCHEME, Record, fetch_record
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.text_source import FILE_BUILDERS, PACKAGES
from llmprune.results.figures.search import SearchFigures
from llmprune.results.report_schema import Report


def recorded_recipe(place: str, overrides: Sequence[str] = ()) -> tuple[Recipe, Record]:
    """Return the recipe of a pushed model, pinned to the recorded commits, and its record.

    A recipe from the hub may name no local file, code or address, unless ``overrides`` give it. Raises HubError and
    RecipeError.
    """
    record, commit = fetch_record(place)
    if record.quantized_from:
        raise HubError(
            f"{place} is the quantized result of {record.quantized_from}; repeat the run that made both: "
            f"llmprune run {SCHEME}{record.quantized_from}"
        )
    recipe = Recipe.parse(record.recipe, [*record.overrides, *_pins(record), *overrides], source=place)
    given = [override.partition("=")[0].strip() for override in overrides]
    problems = [
        f"{key}: a recipe from the hub may only name hub ids, not {value[:80]!r}; set it with --set {key}=…"
        for key, value in (_local_names(recipe) if commit else ())
        if not any(key == name or key.startswith(f"{name}.") for name in given)
    ]
    if problems:
        raise RecipeError(problems, place)
    return recipe, record


def recorded_search(record: Record, recipe: Recipe) -> SearchFigures | None:
    """Return the figures of the search for the shape of a pushed model, whose choice a repeated run takes.

    Another machine might choose another shape. None where nothing was searched, or where the ``recipe`` to run has
    another budget than the recorded one. Raises HubError for figures that cannot be read.
    """
    found = record.report.get("search")
    if recipe.budget is None or not found:
        return None
    before = Recipe.parse(record.recipe, record.overrides).budget
    if before is None or before.model_copy(update={"speed_table": None}) != recipe.budget:
        return None
    try:
        return SearchFigures.model_validate(found)
    except ValidationError as error:
        cause = error.errors()[0]["msg"]
        raise HubError(f"the recorded search cannot be read: {cause}; ask its author to push it again") from error


def _local_names(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield key and value of everything in a recipe that opens a local file or runs code."""
    if not _is_hub_id(recipe.model.id):
        yield "model.id", recipe.model.id
    if recipe.model.base is not None and not _is_hub_id(recipe.model.base):
        yield "model.base", recipe.model.base
    if recipe.recover is not None and recipe.recover.against is not None and not _is_hub_id(recipe.recover.against):
        yield "recover.against", recipe.recover.against
    if recipe.evaluation.against is not None and not _is_hub_id(recipe.evaluation.against):
        yield "evaluation.against", recipe.evaluation.against
    if recipe.budget is not None and recipe.budget.speed_table is not None:
        yield "budget.speed_table", recipe.budget.speed_table
    for key, dataset in _datasets(recipe):
        if not (_is_hub_id(dataset) and Path(dataset).suffix not in FILE_BUILDERS):
            yield f"{key}.dataset", dataset
    for section, windows in _windows(recipe):
        if windows.tokens is not None:
            yield f"{section}.tokens", windows.tokens
    for task in recipe.evaluation.tasks:
        if "/" in task or task.endswith((".yaml", ".yml")):  # lm-eval treats it as a file, which may run code
            yield "evaluation.tasks", task
    if recipe.evaluation.include_path is not None:
        yield "evaluation.include_path", recipe.evaluation.include_path
    if recipe.evaluation.backend is not None:
        yield "evaluation.backend", recipe.evaluation.backend.name


def _is_hub_id(name: str) -> bool:
    """Check that a name is a hub id and no local path, or text of an installed package that llmprune's recipes use."""
    hub_id = is_plain_path(name) and name.count("/") < 2 and not name.startswith(".") and not Path(name).exists()
    return hub_id or name in PACKAGES


def _windows(recipe: Recipe) -> Iterator[tuple[str, TokenWindows]]:
    """Yield the sections that name text, with their keys."""
    yield "calibration", recipe.calibration
    if recipe.evaluation.perplexity is not None:
        yield "evaluation.perplexity", recipe.evaluation.perplexity
    if recipe.recover is not None:
        yield "recover.data", recipe.recover.data


def _datasets(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the section of every data set, with its key, and the data set's name."""
    for section, windows in _windows(recipe):
        if windows.dataset is not None:
            yield section, windows.dataset
        yield from ((f"{section}.sources.{place}", one.dataset) for place, one in enumerate(windows.sources or ()))
    kept_for = (recipe.vocabulary and recipe.vocabulary.keep_for) or ()
    yield from ((f"vocabulary.keep_for.{place}", one.dataset) for place, one in enumerate(kept_for))


def _pins(record: Record) -> list[str]:
    """Return overrides that pin model and datasets to the recorded commits, without push, remote code and devices."""
    provenance = record.report.get("provenance") or {}
    recipe = Recipe.parse(record.recipe, record.overrides)
    pins = ["hub=null"]
    if recipe.devices != "all":  # GPUs of the author's machine
        pins.append("devices=all")
    if recipe.model.trust_remote_code:  # the author of a recipe must not decide this; the user may, with --set
        pins.append("model.trust_remote_code=false")
    own = [source["windows"] for source in provenance.get("calibration_sources", ()) if source["text"] is None]
    if recipe.calibration.self_generated == "auto" and provenance.get("calibration_sources"):  # else the memory decides
        pins.append(f"calibration.self_generated={sum(own)}")
    if recipe.budget is not None and recipe.budget.speed_table is not None:  # a file of the author's machine
        pins.append("budget.speed_table=null")
    pins += _recovery_pins(recipe, record.report)
    if provenance.get("commit"):
        pins.append(f"model.revision={_quoted(provenance['commit'])}")
    commits: dict[str, str] = provenance.get("datasets") or {}
    return pins + [f"{key}.revision={_quoted(commits[name])}" for key, name in _datasets(recipe) if name in commits]


def _recovery_pins(recipe: Recipe, report: dict[str, Any]) -> list[str]:
    """Return overrides for what the training left open: its length, if it was a time, and the windows that are written.

    ``report``: the recorded figures.
    """
    found = report.get("recovery")
    if recipe.recover is None or not found:
        return []
    pins = []
    if recipe.recover.hours is not None:
        in_rounds = sum(one["tokens"] for one in report.get("rounds", ()))
        steps = f"recover.tokens={in_rounds or found['steps'] * found['batch_tokens']}"
        pins += ["recover.hours=null", steps, f"recover.batch_tokens={found['batch_tokens']}"]
    if recipe.recover.data.self_generated == "auto":  # else the memory decides
        pins.append(f"recover.data.self_generated={found['generated']}")
    return pins


def _quoted(commit: str) -> str:
    """Return the commit as YAML text in quotes, because it may consist of digits."""
    return yaml.dump(commit, default_style='"').strip()


def differences(record: Record, report: Report, *, model: Path) -> list[str]:
    """Return a sentence for each difference of the new run from the recorded one; none if the weights are equal."""
    weights = [name for name in record.files if name.endswith(".safetensors")]
    equal = ((model / name).is_file() and sha256_of(model / name) == record.files[name] for name in weights)
    if weights and all(equal):
        return []
    before, after = record.report, report.model_dump(mode="json")
    found = [
        f"{name}: {value_at(before, path)} recorded, {value_at(after, path)} now"
        for name, path in _COMPARED.items()
        if value_at(before, path) != value_at(after, path)
    ]
    removed = record.cut.get("remove_layers"), [layer.layer for layer in report.layers if layer.removed]
    if removed[0] != removed[1] and not report.rounds:  # else the recorded ones are those of the last round
        found.append(f"removed layers: {removed[0]} recorded, {removed[1]} now")
    return found or ["weights differ, although model, tokens and cut are the same"]


_COMPARED = {
    "base commit": ("provenance", "commit"),
    "calibration tokens": ("provenance", "calibration_fingerprint"),
    "parameters": ("pruned", "parameters"),
    "tokens trained on": ("recovery", "tokens"),
    "saved step of the training": ("recovery", "best_step"),
    "mean retention": ("mean_retention",),
    "device": ("provenance", "device"),
    "versions": ("provenance", "versions"),
}
