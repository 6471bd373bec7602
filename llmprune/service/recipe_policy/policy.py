"""The policy for recipes from the network: hub ids, paths that the operator allows, and nothing else.

Every free text of a recipe has a rule, and a text without a rule is refused: a key that is new to recipes is
refused until it gets a rule. Allowed paths become overrides with absolute paths. The recipe itself is not
changed, and the job runs in an empty folder, where no hub id can be the name of a folder by accident.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmprune.common.errors import RecipeError, shortened
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.yaml_reader import dump
from llmprune.service.recipe_policy.allowed_paths import JOB_SCHEME, ModelOf, model_of_job
from llmprune.service.recipe_policy.free_text import FreeText, NotAllowedError, free_texts
from llmprune.service.recipe_policy.rules import CLOSED_SECTIONS, rule_of
from llmprune.service.recipe_policy.yaml_limits import refuse_costly_parts
from llmprune.service.settings import Settings

_OF_BASE = ("model.id", "recover.against", "evaluation.against")  # keys that may name the model of a job


def no_model(_: str) -> Path | None:
    """Allow the model of no job."""
    return None


@dataclass
class RecipePolicy:
    """Check of one recipe: its problems, and the overrides that replace its paths by absolute ones."""

    settings: Settings
    model_of: ModelOf = no_model
    base: str | None = None  # the job whose model the recipe starts from, as job://ID: it may be compared with it
    problems: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # the keys that the problems are about
    overrides: list[str] = field(default_factory=list)

    def check(self, recipe: Recipe) -> None:
        """Apply the rule of every free text."""
        self.base = recipe.model.id if recipe.model.id.startswith(JOB_SCHEME) else None
        if recipe.model.trust_remote_code:
            self._refuse("model.trust_remote_code", "is never run here; remove it")
        if recipe.model.pickles:
            self._refuse("model.pickles", "are not read here; remove it, and give a model with safetensors")
        for section, given in zip(CLOSED_SECTIONS, (recipe.evaluation.backend, recipe.hub), strict=True):
            if given is not None:
                instead = ", and push the finished job with a token of its own" if section == "hub" else ""
                self._refuse(section, f"is not accepted over the network; remove it{instead}")
        if recipe.budget is not None and recipe.budget.family is not None:
            message = "is a list, and a job makes one model; give one value, or make a sweep, which has a job for each"
            self._refuse(f"budget.{recipe.budget.family}", message)
        closed = tuple(f"{section}." for section in CLOSED_SECTIONS)  # refused above, once for the whole section
        for text in free_texts(recipe):
            if not text.key.startswith(closed):
                self._check_text(text)

    def _check_text(self, text: FreeText) -> None:
        rule = rule_of(text.key)
        if rule is None:
            return self._refuse(text.key, "is not accepted over the network; remove it")
        try:
            is_job = self.base is not None and text.key in _OF_BASE and text.value == self.base
            path = model_of_job(text, self.model_of) if is_job else rule(text, self.settings)
        except NotAllowedError as error:
            return self._refuse(text.key, f"{text.value[:80]!r} is not allowed here; {error.remedy}")
        if path is not None:
            self.overrides.append(f"{text.key}={json.dumps(str(path))}")
        return None

    def _refuse(self, key: str, message: str) -> None:
        self.refused.append(key)
        self.problems.append(f"{key}: {message}")


@dataclass(frozen=True)
class ExaminedRecipe:
    """A recipe after the checks of the schema and of the policy, and the part of it that can be planned."""

    recipe: Recipe | None  # without the keys that are wrong or refused; None where too little is left
    text: str
    overrides: list[str]  # to run or plan ``text`` with
    problems: list[str]
    wrong: tuple[str, ...]  # keys that were left out


@dataclass(frozen=True)
class AdmittedRecipe:
    """A recipe that may run, and the overrides to run it with."""

    recipe: Recipe
    overrides: list[str]


def admit(text: str, overrides: Sequence[str], *, settings: Settings, model_of: ModelOf = no_model) -> AdmittedRecipe:
    """Return a recipe that may run. Raises RecipeError that lists every problem."""
    examined = examine(text, overrides, settings=settings, model_of=model_of)
    if examined.problems or examined.recipe is None:
        raise RecipeError(examined.problems, "recipe")
    return AdmittedRecipe(examined.recipe, examined.overrides)


def examine(text: str, overrides: Sequence[str], *, settings: Settings, model_of: ModelOf = no_model) -> ExaminedRecipe:
    """Check a recipe against schema and policy, and list all problems of both.

    ``model_of``: finds the models of jobs that the client may read. Raises RecipeError for text that is too costly to
    read, or is no mapping.
    """
    refuse_costly_parts(text, overrides)
    reading = Recipe.read(text, overrides)
    if reading.recipe is None:
        return ExaminedRecipe(None, text, [], reading.problems, reading.wrong)
    policy = RecipePolicy(settings, model_of)
    policy.check(reading.recipe)
    problems = [*reading.problems, *policy.problems]
    if not problems:
        return ExaminedRecipe(reading.recipe, text, [*overrides, *policy.overrides], [], ())
    rest = reading.without(re.sub(r"\.\d+(?=\.|$).*", "", key) for key in policy.refused)
    of_rest = RecipePolicy(settings, model_of)
    if rest.recipe is not None:
        of_rest.check(rest.recipe)
    recipe = None if of_rest.problems else rest.recipe
    return ExaminedRecipe(recipe, dump(rest.data), of_rest.overrides, shortened(problems, len(problems)), rest.wrong)
