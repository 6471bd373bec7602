"""What a run refuses before it reads weights, apart from what the model's structure rules out: a list of checks.

A plan and a run go through the same list, and all problems are reported together. A check names the keys of the recipe
that it depends on: where one of these is wrong already, what the check would say of the rest is not known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from llmprune.checkpoint.loading import require_tokenizer
from llmprune.common.distributed import require_windows_for_all
from llmprune.common.errors import LLMPruneError, RecipeError
from llmprune.data.sources import local_bytes, require_present
from llmprune.data.windows import require_shares
from llmprune.evaluation.bench.generation_speed import require_positions
from llmprune.evaluation.generation import require_windows
from llmprune.evaluation.lm_eval.tasks import check_tasks
from llmprune.planning.inputs import Inputs
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.validation_messages import models_in

T = TypeVar("T")

# A plan reads local text whole up to this size: too little text, a missing column or bad encoding are found there.
READ_WHOLE = 32 * 10**6  # bytes of all sources together


class Collected:
    """Errors of several checks, each with the place in the recipe that it is about.

    ``wrong``: keys that are known to be wrong. ``problems``: what is wrong with them.
    """

    def __init__(self, wrong: Iterable[str] = (), problems: Iterable[str] = ()) -> None:
        self.wrong, self.problems = tuple(wrong), tuple(problems)
        self.errors: list[LLMPruneError] = []

    def attempt(self, place: str, reads: Iterable[str], *, work: Callable[[], T]) -> tuple[bool, T | None]:
        """Do a piece of work that depends on the keys ``reads``; whether it was done, and its value."""
        if any(_overlap(key, wrong) for key in reads for wrong in self.wrong):
            return False, None
        try:
            return True, work()
        except LLMPruneError as error:
            self.errors.append(_placed(place, error))
            return False, None

    def raise_all(self, source: str = "") -> None:
        """Raise the only error as it is, several as one RecipeError; none: go on."""
        if len(self.errors) == 1 and not self.problems:
            raise self.errors[0]
        found = [*self.problems, *self.listed()]
        if found:
            raise RecipeError(found, source)

    def listed(self) -> list[str]:
        """A sentence for each problem that the checks found."""
        return [
            problem
            for error in self.errors
            for problem in (error.problems if isinstance(error, RecipeError) else [str(error)])
        ]


@dataclass(frozen=True)
class Check:
    """One check. ``after``: checks that must have passed, by name, for else it would repeat what they said."""

    name: str
    place: str
    reads: tuple[str, ...]
    run: Callable[[], object]
    after: tuple[str, ...] = ()


def run_checks(inputs: Inputs, collected: Collected) -> None:
    """Go through the list, and add each problem to what was collected."""
    passed: set[str] = set()
    for check in checks_of(inputs):
        if (
            all(name in passed for name in check.after)
            and collected.attempt(check.place, check.reads, work=check.run)[0]
        ):
            passed.add(check.name)


def checks_of(inputs: Inputs) -> list[Check]:
    """The checks for a recipe, those first that others need."""
    recipe, evaluation = inputs.recipe, inputs.recipe.evaluation
    model = ("model",)
    found = [Check("config", "model", model, lambda: inputs.config), *_text_checks("calibration", inputs)]
    if inputs.needs_tokenizer:
        found.insert(1, Check("tokenizer", "model", model, lambda: require_tokenizer(recipe.model), ("config",)))
    if evaluation.perplexity:
        found += _text_checks("evaluation.perplexity", inputs)
    samples = _keys("calibration", "samples", "tokens", "key")
    found.append(Check("processes", "calibration.samples", samples, lambda: _enough_for_all(recipe)))
    if recipe.depth and recipe.depth.layers is None:
        enough = partial(recipe.depth.criterion.require_samples, recipe.calibration.shape()[0])
        found.append(Check("depth samples", "depth.criterion", ("depth", *samples), enough))
    if evaluation.speed:
        fits = partial(require_positions, evaluation.speed)
        reads: tuple[str, ...] = ("evaluation.speed", *model)
        found.append(Check("speed", "evaluation.speed", reads, lambda: fits(inputs.config), ("config",)))
    if evaluation.generation and evaluation.perplexity and _length_is_known(evaluation.perplexity):
        windows = partial(require_windows, evaluation.generation, evaluation.perplexity.shape())
        reads = ("evaluation.generation", *_keys("evaluation.perplexity", "samples", "sequence_length", "tokens"))
        found.append(Check("generation", "evaluation.generation", reads, windows))
    tasks = ("evaluation.tasks", "evaluation.include_path", "evaluation.backend")
    found.append(Check("tasks", "evaluation", tasks, lambda: check_tasks(evaluation)))
    if evaluation.gate and not evaluation.tasks:
        reads = ("evaluation.gate", "evaluation.tasks")
        found.append(Check("judged", "evaluation.gate", reads, _nothing_to_judge))
    return found


def _text_checks(place: str, inputs: Inputs) -> list[Check]:
    """The checks of one section of text: its files, the length of its windows, and what is in it."""
    held_out = place != "calibration"
    windows: TokenWindows | None = inputs.recipe.evaluation.perplexity if held_out else inputs.recipe.calibration
    assert windows is not None, "the section is there"
    shape = inputs.recipe.evaluation.perplexity.shape() if held_out and inputs.recipe.evaluation.perplexity else None
    samples, length = shape or inputs.recipe.calibration.shape()
    files, size = f"{place} files", f"{place} length"
    origin = _keys(place, "dataset", "sources", "split", "tokens", "key")

    def read() -> object:
        return inputs.held_out if held_out else inputs.windows

    found = [Check(files, place, origin, lambda: _files(windows, samples))]
    if _length_is_known(windows):
        reads = (*_keys(place, "sequence_length", "tokens", "key"), "model")
        fits = partial(inputs.require_positions, length)
        found.append(Check(size, f"{place}.sequence_length", reads, fits, ("config",)))
    if _readable(windows, inputs):
        after = ["config", *(check.name for check in found), *([] if windows.tokens else ["tokenizer"])]
        found.append(Check(f"{place} text", place, (place, "model"), read, tuple(after)))
    return found


def _length_is_known(windows: TokenWindows) -> bool:
    """Whether the recipe or a readable file of tokens says how long the windows are."""
    return not windows.tokens or windows.sequence_length is not None or windows.stored_shape() is not None


def _files(windows: TokenWindows, samples: int) -> None:
    """Raise CalibrationError or RecipeError for local files that are not there, and for sources without a share."""
    problems = []
    for source in windows.text_sources():
        try:
            require_present(source)
        except LLMPruneError as error:
            problems.append(str(error))
    if windows.tokens and not Path(windows.tokens).is_file():
        problems.append(f"the tokens file {windows.tokens} does not exist (looked in {Path.cwd()}); check the path")
    if problems:
        raise RecipeError(problems)
    require_shares(windows, samples)


def _readable(windows: TokenWindows, inputs: Inputs) -> bool:
    """Whether the text is on this machine, and so small that a plan may read it."""
    if windows.tokens:
        return True
    sizes = [local_bytes(source) for source in windows.text_sources()]
    local = [size for size in sizes if size is not None]
    return len(local) == len(sizes) and sum(local) <= READ_WHOLE and _has_own_tokenizer(inputs.recipe)


def _has_own_tokenizer(recipe: Recipe) -> bool:
    """Whether the tokenizer is on this machine: a plan fetches no more than the config from the hub."""
    return Path(recipe.model.id).expanduser().is_dir()


def _enough_for_all(recipe: Recipe) -> None:
    require_windows_for_all(recipe.calibration.shape()[0])


def _nothing_to_judge() -> None:
    raise RecipeError("evaluation.gate: there is nothing to judge; name lm-eval tasks in evaluation.tasks")


def _keys(place: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{place}.{name}" for name in names)


def _overlap(one: str, other: str) -> bool:
    """Whether one key is the other, or lies in it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _placed(place: str, error: LLMPruneError) -> LLMPruneError:
    """The error with its place in front of each sentence that does not name a key itself."""

    def named(said: str) -> str:
        return said if _starts_with_a_key(said) else f"{place}: {said}"

    if isinstance(error, RecipeError):
        return RecipeError([named(problem) for problem in error.problems], error.source)
    said = named(str(error))
    return error if said == str(error) else type(error)(said)


def _starts_with_a_key(said: str) -> bool:
    """Check whether a sentence names its place: an option, a section, or a key of one; a file's name is neither."""
    if said.startswith("--"):
        return True
    start = re.match(r"(\w+)(?::|\.(\w+))", said)
    field = Recipe.model_fields.get(start[1]) if start else None
    if start is None or field is None:
        return False
    return start[2] is None or any(start[2] in model.model_fields for model in models_in(field.annotation))
