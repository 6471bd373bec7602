"""The recipe as one frozen value: read from YAML with overrides, checked, fingerprinted.

Nothing here imports torch, so that a wrong recipe is reported at once.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator

from llmprune.common.errors import RecipeError
from llmprune.common.hub.secrets import has_token
from llmprune.common.schema import Section
from llmprune.common.text_files import utf8
from llmprune.criteria.base import DepthCriterion
from llmprune.recipe.budget import Budget
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.combinations import CHECKS
from llmprune.recipe.depth import Depth
from llmprune.recipe.devices import DeviceChoice
from llmprune.recipe.evaluation import Evaluation
from llmprune.recipe.experts import Experts
from llmprune.recipe.export import Export
from llmprune.recipe.hidden import Hidden, number_or_settings
from llmprune.recipe.hub import Hub
from llmprune.recipe.model import ModelSource
from llmprune.recipe.overrides import apply_override
from llmprune.recipe.recover import Recover
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.recipe.validation_messages import describe_problems, wrong_places
from llmprune.recipe.vocabulary import Vocabulary
from llmprune.recipe.width import Width
from llmprune.recipe.yaml_reader import dump, read


def _settings_or_false(value: Any) -> Any:
    if value is True or value is None:
        raise ValueError("leave refit out for the default, give settings such as {ridge: 0.1}, or write false")
    return None if value is False else value


class Recipe(Section):
    """Settings of a run. Sections may come in any order."""

    model: ModelSource = Field(description="The model to prune.")
    devices: DeviceChoice = Field(
        "all",
        description="GPUs of this machine that the run uses: all, a number of them, or a list such as [0, 2]. "
        "`llmprune run` starts a process for each. Without a GPU, or where `CUDA_VISIBLE_DEVICES=` hides all, the CPU "
        "computes.",
    )
    calibration: Calibration = Field(
        Calibration(), description="The text that scores and refits are computed on; left out: `mix: general`."
    )
    depth: Depth | None = Field(None, description="Layers to remove; left out: none.")
    width: Width | None = Field(None, description="MLP neurons and attention heads to keep; left out: all.")
    experts: Experts | None = Field(None, description="Experts to remove; left out: none.")
    hidden: Annotated[Hidden | None, BeforeValidator(number_or_settings)] = Field(
        None,
        description="Channels of the residual stream to keep in the whole model, such as `hidden: 0.9`; left out: all.",
    )
    budget: Budget | None = Field(
        None,
        description="Size that the model must reach; the numbers of layers, neurons, heads and experts are searched. "
        "In place of depth, width, experts and hidden.",
    )
    vocabulary: Vocabulary | None = Field(
        None, description="Tokens to remove from embedding, head and tokenizer; left out: none."
    )
    sparsity: Sparsity | None = Field(None, description="Weights set to zero in the layers that stay; left out: none.")
    refit: Annotated[Refit | None, BeforeValidator(_settings_or_false)] = Field(
        Refit(), description="Closed-form repair of the cut; false: none."
    )
    recover: Recover | None = Field(None, description="Training of the pruned model; left out: none.")
    evaluation: Evaluation = Field(Evaluation(), description="Measurements of the dense and the pruned model.")
    export: Export = Field(Export(), description="Files of the result.")
    hub: Hub | None = Field(None, description="Repository that the result is pushed to; left out: none.")

    @field_validator("budget", "recover", "hub", mode="after")
    @classmethod
    def _fits_the_others(cls, section: Any, info: ValidationInfo) -> Any:
        """Refuse a section beside others that it cannot be combined with."""
        if section is not None and info.field_name is not None:
            CHECKS[info.field_name](section, info.data)
        return section

    @field_validator("evaluation", mode="after")
    @classmethod
    def _one_reference(cls, evaluation: Evaluation, info: ValidationInfo) -> Evaluation:
        """Refuse two models to compare with."""
        recover = info.data.get("recover")
        if recover is None or None in (recover.against, evaluation.against):
            return evaluation
        names = [(one.against, one.against_revision) for one in (recover, evaluation)]
        if names[0] != names[1]:
            raise ValueError(
                "against is another model than recover.against, and one run compares with one; remove one of the two"
            )
        return evaluation

    _text: str = PrivateAttr("")
    _overrides: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe file; ``overrides``: texts of the form ``section.key=value``. Raises RecipeError."""
        return cls.parse(_text_of(path), overrides, source=str(path))

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = (), *, source: str = "recipe") -> Self:
        """Read a recipe from YAML text. Raises RecipeError that lists every problem at once."""
        partial = cls.read(text, overrides, source=source)
        if partial.problems or partial.recipe is None:
            raise RecipeError(partial.problems, source)
        return partial.recipe

    @classmethod
    def read_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> PartialRecipe[Self]:
        """Read a recipe file, and leave out the keys that are wrong. Raises RecipeError where it is no YAML mapping."""
        return cls.read(_text_of(path), overrides, source=str(path))

    @classmethod
    def read(cls, text: str, overrides: Sequence[str] = (), *, source: str = "recipe") -> PartialRecipe[Self]:
        """Read YAML text, and leave out the keys that are wrong. Raises RecipeError where it is no YAML mapping."""
        refuse_tokens(text, overrides, source=source)
        try:
            document = read(text)
        except RecipeError as error:
            raise RecipeError(error.problems, source) from None
        data, problems = document.data, document.repeated
        if not isinstance(data, dict):
            raise RecipeError("a recipe is a mapping of sections, at least model", source)
        for override in overrides:
            try:
                apply_override(data, override)
            except RecipeError as error:
                problems += [f"--set {override!r}: {problem}" for problem in error.problems]
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            return cls._without_wrong_keys(data, problems + describe_problems(error, cls, data=data))
        recipe._text, recipe._overrides = text, tuple(overrides)
        return PartialRecipe(recipe, problems, (), data)

    @classmethod
    def _without_wrong_keys(cls, data: dict[str, Any], problems: list[str]) -> PartialRecipe[Self]:
        """Remove wrong keys until the rest is a recipe; no recipe where the model is wrong."""
        data = copy.deepcopy(data)
        wrong: list[str] = []
        while True:
            try:
                return PartialRecipe(cls.model_validate(data), problems, tuple(wrong), data)
            except ValidationError as error:
                places = [place for place in wrong_places(error, data) if _remove(data, place)]
            if not places or "model" not in data:
                return PartialRecipe(None, problems, tuple(wrong), data)
            wrong += [".".join(map(str, place)) for place in places]

    @property
    def text(self) -> str:
        """The user's YAML with its line endings; for a recipe made in Python, its YAML."""
        if self._text:
            return self._text
        values = self.model_dump(mode="json", exclude_unset=True)
        if "refit" in values and values["refit"] is None:
            values["refit"] = False
        return dump(values)

    def derived(self, update: dict[str, Any]) -> Self:
        """Return the recipe with other sections; its text is its own YAML then. ``update``: valid sections, by name."""
        recipe = self.model_copy(update=update)
        recipe._text, recipe._overrides = "", ()
        return recipe

    def with_chosen(self, update: dict[str, Any]) -> Self:
        """Return the recipe with sections that a run has chosen; its text remains that of the user's recipe."""
        recipe = self.model_copy(update=update)
        recipe._text = self.text
        return recipe

    @property
    def overrides(self) -> tuple[str, ...]:
        """The ``--set`` texts that were applied to the YAML."""
        return self._overrides

    @property
    def reference(self) -> ModelSource:
        """The dense model that the pruned one is trained towards and compared with: another only by ``against``."""
        for section in (self.recover, self.evaluation):
            if section is not None and section.against is not None:
                return self.model.at(section.against, section.against_revision)
        return self.model

    @property
    def removes_parts(self) -> bool:
        """True where layers, neurons, heads, experts or residual channels may be removed."""
        return bool(self.depth or self.width or self.experts or self.hidden)

    @property
    def cuts_only_vocabulary(self) -> bool:
        """True where tokens are removed and no layer is changed."""
        others = (self.depth, self.width, self.experts, self.hidden, self.budget, self.sparsity, self.recover)
        return self.vocabulary is not None and not any(others)

    @property
    def layer_criterion(self) -> DepthCriterion | None:
        """Criterion that layers are scored by; None where none are."""
        return self.depth.criterion if self.depth and self.depth.layers is None else None

    def fingerprint(self, sections: Iterable[str]) -> str:
        """SHA-256 of the named sections' values, defaults included."""
        names = set(sections)
        assert names <= set(type(self).model_fields), f"not sections: {names - set(type(self).model_fields)}"
        values = self.model_dump(mode="json", include=names)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class PartialRecipe(Generic[R]):
    """A recipe without the keys that are wrong, and the problems with these keys."""

    recipe: R | None  # None where too little is left
    problems: list[str]  # a sentence for each mistake
    wrong: tuple[str, ...]  # the keys that were left out, such as calibration.samples
    data: dict[str, Any]  # the values that the recipe was made from

    def without(self, keys: Iterable[str]) -> PartialRecipe[R]:
        """Leave out more keys."""
        data = copy.deepcopy(self.data)
        removed = tuple(key for key in keys if _remove(data, tuple(key.split("."))))
        if self.recipe is None or not removed:
            return self
        again = type(self.recipe)._without_wrong_keys(data, self.problems)
        return PartialRecipe(again.recipe, self.problems, (*self.wrong, *removed, *again.wrong), again.data)


def _remove(data: dict[str, Any], place: Sequence[Any]) -> bool:
    """Remove a key, or the list that it is in. Return True where it existed."""
    inner: Any = data
    for part in place[:-1]:
        following = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(following, list):
            return inner.pop(part, None) is not None
        inner = following
    return isinstance(inner, dict) and bool(place) and inner.pop(place[-1], _ABSENT) is not _ABSENT


_ABSENT = object()


def _text_of(path: str | Path) -> str:
    """Read a recipe file's text. Raises RecipeError."""
    try:
        return utf8(Path(path).read_bytes())
    except ValueError as error:
        raise RecipeError(f"the recipe {error}", str(path)) from error
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"the recipe cannot be read: {reason}; give the path of a YAML file", str(path)) from error


def refuse_tokens(text: str, overrides: Sequence[str], *, source: str) -> None:
    """Raise RecipeError for a hub token in a recipe, because run folder and model card include the recipe."""
    lines = [f"line {number}" for number, line in enumerate(text.splitlines(), start=1) if has_token(line)]
    lines += [f"override {number} (--set)" for number, one in enumerate(overrides, start=1) if has_token(one)]
    if lines:
        raise RecipeError(
            [f"{line}: holds a token of the hub; remove it, and set HF_TOKEN instead" for line in lines], source
        )


S = TypeVar("S", bound=Section)


def validate_arguments(section: type[S], values: dict[str, Any]) -> S:
    """Make a section from command-line arguments. Raises RecipeError that lists every problem."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise RecipeError(describe_problems(error, section, data=values), "arguments") from None
