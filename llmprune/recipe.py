"""The recipe: its schema, its errors and its fingerprints.

Every room's own section is parsed here into one frozen value. Nothing here
imports torch, so that a wrong recipe is answered at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from llmprune.calibration import Calibration
from llmprune.criteria import Activation, AnyDepthCriterion, AnyWidthCriterion, BlockInfluence
from llmprune.errors import RecipeError
from llmprune.evaluation.section import Evaluation
from llmprune.model.saving import Export
from llmprune.model.source import ModelSource
from llmprune.problems import describe_problems
from llmprune.refit import Refit
from llmprune.schema import Section


class Depth(Section):
    """Which decoder layers go: a number to remove, a number to keep, or the layers themselves."""

    remove: int | None = Field(None, gt=0, description="Number of layers to remove.")
    keep: int | None = Field(None, gt=0, description="Number of layers to keep.")
    layers: tuple[int, ...] | None = Field(
        None, strict=False, min_length=1, description="Indices of the layers to remove, from 0."
    )
    criterion: AnyDepthCriterion = Field(BlockInfluence(), description="How layers are scored.")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        _exactly_one(self, ("remove", "keep", "layers"))
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError("layers names a layer twice; name each layer once")
        if self.layers is not None and min(self.layers) < 0:
            raise ValueError("layers counts from 0; negative indices are not read")
        return self


class Width(Section):
    """How many MLP neurons stay in every layer: a fraction, or a number."""

    mlp: float | None = Field(None, gt=0, le=1, description="Fraction of the MLP neurons kept.")
    neurons: int | None = Field(None, gt=0, description="Number of MLP neurons kept.")
    criterion: AnyWidthCriterion = Field(Activation(), description="How neurons are scored.")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        _exactly_one(self, ("mlp", "neurons"))
        return self


def _settings_or_false(value: Any) -> Any:
    if value is True or value is None:
        raise ValueError("leave refit out for the default, give settings such as {ridge: 0.1}, or say false")
    return None if value is False else value


class Recipe(Section):
    """What the user wants, declaratively. Sections have no order."""

    model: ModelSource = Field(description="The model to prune.")
    calibration: Calibration = Field(description="The text that scores and repairs are measured on.")
    depth: Depth | None = Field(None, description="Layers to remove; left out: none.")
    width: Width | None = Field(None, description="MLP neurons to keep; left out: all.")
    refit: Annotated[Refit | None, BeforeValidator(_settings_or_false)] = Field(
        Refit(), description="Closed-form repair; false: none."
    )
    evaluation: Evaluation = Field(Evaluation(), description="What is measured on dense and pruned.")
    export: Export = Field(Export(), description="How the result is written.")

    _text: str = PrivateAttr("")
    _overrides: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe file; ``overrides`` are ``section.key=value`` texts. Raises RecipeError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe cannot be read: {error}; give the path of a YAML file", str(path)) from error
        return cls.parse(text, overrides, source=str(path))

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = (), source: str = "recipe") -> Self:
        """Read a recipe from YAML text. Raises RecipeError that lists every problem at once."""
        data = _read_yaml(text, source)
        for override in overrides:
            _apply_override(data, override)
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(describe_problems(error, cls), source) from None
        recipe._text, recipe._overrides = text, tuple(overrides)
        return recipe

    @property
    def text(self) -> str:
        """The user's YAML, verbatim; a recipe made in Python is written out."""
        return self._text or yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False)

    @property
    def overrides(self) -> tuple[str, ...]:
        """The ``--set`` texts that were applied on top of the YAML."""
        return self._overrides

    def fingerprint(self, sections: Iterable[str]) -> str:
        """SHA-256 of the named sections' values, defaults included."""
        values = self.model_dump(mode="json", include=set(sections))
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _exactly_one(section: Section, names: Sequence[str]) -> None:
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        raise ValueError(f"needs exactly one of {', '.join(names)}; {' and '.join(given) or 'none'} given")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win in silence; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]  # PyYAML has none
            line = key_node.start_mark.line + 1
            if not isinstance(key, str | int | float | bool | None):
                raise RecipeError(f"line {line}: a key must be a word, not {key!r}")
            if key in seen:
                raise RecipeError(f"line {line}: {key!r} is there twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, _UniqueKeyLoader)
    except RecipeError as error:
        raise RecipeError(error.problems, source) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{place}not valid YAML: {getattr(error, 'problem', error)}", source) from None
    if not isinstance(data, dict):
        raise RecipeError("a recipe is a mapping of sections, at least model and calibration", source)
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override!r}: the form is section.key=value, such as width.mlp=0.5")
    place = data
    for key in keys[:-1]:
        child = place.get(key)
        if not isinstance(child, dict):
            child = place[key] = {}
        place = child
    try:
        place[keys[-1]] = yaml.load(value, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML ({error})") from None
