"""The recipe: its schema, its errors and its fingerprints.

Every room's own section is parsed here into one frozen value. Nothing here
imports torch, so that a wrong recipe is answered at once.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError

from llmprune.common.errors import RecipeError
from llmprune.common.hub.secrets import has_token
from llmprune.common.schema import Section
from llmprune.common.text_files import utf8
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.depth import Depth
from llmprune.recipe.evaluation import Evaluation
from llmprune.recipe.experts import Experts
from llmprune.recipe.export import Export
from llmprune.recipe.hub import Hub
from llmprune.recipe.model import ModelSource
from llmprune.recipe.overrides import apply_override
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.recipe.validation_messages import describe_problems, wrong_places
from llmprune.recipe.width import Width
from llmprune.recipe.yaml_reader import dump, read


def _settings_or_false(value: Any) -> Any:
    if value is True or value is None:
        raise ValueError("leave refit out for the default, give settings such as {ridge: 0.1}, or say false")
    return None if value is False else value


class Recipe(Section):
    """What the user wants, declaratively. Sections have no order."""

    model: ModelSource = Field(description="The model to prune.")
    calibration: Calibration = Field(description="The text that scores and repairs are measured on.")
    depth: Depth | None = Field(None, description="Layers to remove; left out: none.")
    width: Width | None = Field(None, description="MLP neurons and attention heads to keep; left out: all.")
    experts: Experts | None = Field(None, description="Experts to remove; left out: none.")
    sparsity: Sparsity | None = Field(None, description="Weights made zero in what stays; left out: none.")
    refit: Annotated[Refit | None, BeforeValidator(_settings_or_false)] = Field(
        Refit(), description="Closed-form repair; false: none."
    )
    evaluation: Evaluation = Field(Evaluation(), description="What is measured on dense and pruned.")
    export: Export = Field(Export(), description="How the result is written.")
    hub: Hub | None = Field(None, description="Where the result is pushed to; left out: nowhere.")

    _text: str = PrivateAttr("")
    _overrides: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe file; ``overrides`` are ``section.key=value`` texts. Raises RecipeError."""
        return cls.parse(_text_of(path), overrides, source=str(path))

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = (), *, source: str = "recipe") -> Self:
        """Read a recipe from YAML text. Raises RecipeError that lists every problem at once."""
        reading = cls.read(text, overrides, source=source)
        if reading.problems or reading.recipe is None:
            raise RecipeError(reading.problems, source)
        return reading.recipe

    @classmethod
    def read_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> Reading[Self]:
        """Read a recipe file as far as it can be read. Raises RecipeError where it is no mapping in YAML."""
        return cls.read(_text_of(path), overrides, source=str(path))

    @classmethod
    def read(cls, text: str, overrides: Sequence[str] = (), *, source: str = "recipe") -> Reading[Self]:
        """Read YAML text as far as it can be read. Raises RecipeError where it is no mapping in YAML."""
        refuse_tokens(text, overrides, source=source)
        try:
            document = read(text)
        except RecipeError as error:
            raise RecipeError(error.problems, source) from None
        data, problems = document.data, document.repeated
        if not isinstance(data, dict):
            raise RecipeError("a recipe is a mapping of sections, at least model and calibration", source)
        for override in overrides:
            try:
                apply_override(data, override)
            except RecipeError as error:
                problems += [f"--set {override!r}: {problem}" for problem in error.problems]
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            return cls._partly(data, problems + describe_problems(error, cls, data=data))
        recipe._text, recipe._overrides = text, tuple(overrides)
        return Reading(recipe, problems, (), data)

    @classmethod
    def _partly(cls, data: dict[str, Any], problems: list[str]) -> Reading[Self]:
        """What is left of a recipe without its wrong keys; no recipe where the model or the text is gone."""
        data = copy.deepcopy(data)
        wrong: list[str] = []
        while True:
            try:
                return Reading(cls.model_validate(data), problems, tuple(wrong), data)
            except ValidationError as error:
                places = [place for place in wrong_places(error, data) if _remove(data, place)]
            if not places or not {"model", "calibration"} <= data.keys():
                return Reading(None, problems, tuple(wrong), data)
            wrong += [".".join(map(str, place)) for place in places]

    @property
    def text(self) -> str:
        """The user's YAML, verbatim to the line endings; a recipe made in Python is written out."""
        if self._text:
            return self._text
        values = self.model_dump(mode="json", exclude_unset=True)
        if "refit" in values and values["refit"] is None:
            values["refit"] = False
        return dump(values)

    @property
    def overrides(self) -> tuple[str, ...]:
        """The ``--set`` texts that were applied on top of the YAML."""
        return self._overrides

    def fingerprint(self, sections: Iterable[str]) -> str:
        """SHA-256 of the named sections' values, defaults included."""
        names = set(sections)
        assert names <= set(type(self).model_fields), f"not sections: {names - set(type(self).model_fields)}"
        values = self.model_dump(mode="json", include=names)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Reading(Generic[R]):
    """A recipe's text as far as it can be read."""

    recipe: R | None  # without the keys that are wrong; None where too little is left
    problems: list[str]  # a sentence for each mistake
    wrong: tuple[str, ...]  # the keys that were left out, such as calibration.samples
    data: dict[str, Any]  # what the recipe was made of

    def without(self, keys: Iterable[str]) -> Reading[R]:
        """The same without further keys."""
        data = copy.deepcopy(self.data)
        gone = tuple(key for key in keys if _remove(data, tuple(key.split("."))))
        if self.recipe is None or not gone:
            return self
        again = type(self.recipe)._partly(data, self.problems)
        return Reading(again.recipe, self.problems, (*self.wrong, *gone, *again.wrong), again.data)


def _remove(data: dict[str, Any], place: Sequence[Any]) -> bool:
    """Take a key out, or the list that it is in; whether it was there."""
    inner: Any = data
    for part in place[:-1]:
        following = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(following, list):
            return inner.pop(part, None) is not None
        inner = following
    return isinstance(inner, dict) and bool(place) and inner.pop(place[-1], _ABSENT) is not _ABSENT


_ABSENT = object()


def _text_of(path: str | Path) -> str:
    """A recipe file's text. Raises RecipeError."""
    try:
        return utf8(Path(path).read_bytes())
    except ValueError as error:
        raise RecipeError(f"the recipe {error}", str(path)) from error
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"the recipe cannot be read: {reason}; give the path of a YAML file", str(path)) from error


def refuse_tokens(text: str, overrides: Sequence[str], *, source: str) -> None:
    """Raise RecipeError for a secret in a recipe, which is written into the run folder and travels onto the hub."""
    lines = [f"line {number}" for number, line in enumerate(text.splitlines(), start=1) if has_token(line)]
    lines += [f"override {number} (--set)" for number, one in enumerate(overrides, start=1) if has_token(one)]
    if lines:
        raise RecipeError(
            [f"{line}: holds a token of the hub; take it out, for it is read from HF_TOKEN" for line in lines], source
        )


S = TypeVar("S", bound=Section)


def validate_arguments(section: type[S], values: dict[str, Any]) -> S:
    """A section made of command-line arguments; RecipeError lists what is wrong with them."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise RecipeError(describe_problems(error, section, data=values), "arguments") from None
