"""Recipes with a budget, their dense model, and the space of shapes, from a config alone."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from llmprune.checkpoint.loading import load_config
from llmprune.planning.base import Base, describe_base
from llmprune.planning.budget.sizes import ShapeCounter
from llmprune.planning.budget.space import SearchSpace, spanned
from llmprune.recipe.recipe import Recipe


def budget_recipe(folder: Path, budget: str, *, sections: str = "") -> Recipe:
    """A recipe for the model in a folder. ``budget``: YAML of the section; ``sections``: of others."""
    return Recipe.parse(f"model: {{id: '{folder}'}}\ncalibration: {{dataset: text.txt}}\nbudget: {budget}\n{sections}")


def base_of(folder: Path, config: PretrainedConfig) -> Base:
    """The dense model of a config, which is saved in a folder."""
    config.save_pretrained(folder)
    recipe = budget_recipe(folder, "{parameters: 0.5}")
    return describe_base(recipe, load_config(recipe.model))


def space_of(counter: ShapeCounter, budget: str) -> SearchSpace:
    """The space of a budget. ``budget``: YAML of the section."""
    found = budget_recipe(Path("model"), budget).budget
    assert found is not None
    return spanned(found, counter)
