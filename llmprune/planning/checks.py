"""Checks of a recipe that need no weights, apart from those of the model's structure.

A plan and a run go through the same list, and all problems are reported together. A check names the keys of the recipe
that it depends on, and is skipped where one of them is known to be wrong: its result would mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from llmprune.checkpoint.loading import require_tokenizer
from llmprune.common.distributed import require_windows_for_all
from llmprune.common.errors import LLMPruneError, RecipeError
from llmprune.criteria.base import DepthCriterion
from llmprune.data.window_sources import sources_of_windows
from llmprune.evaluation.bench.generation_speed import require_positions
from llmprune.evaluation.lm_eval.tasks import check_tasks
from llmprune.evaluation.prompts import require_windows
from llmprune.planning.budget.cost import require_windows_to_search
from llmprune.planning.devices import require_devices
from llmprune.planning.export_checks import require_gguf, require_quantized
from llmprune.planning.reference import ids_in_reference, key_of_reference, require_matching_layers
from llmprune.planning.texts.text_checks import (
    Check,
    is_readable,
    keys_in,
    length_is_known,
    recovery_checks,
    text_checks,
    vocabulary_checks,
)
from llmprune.planning.texts.text_inputs import TextInputs
from llmprune.recipe.calibration import NEEDS_SEVERAL, Calibration
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.validation_messages import models_in

T = TypeVar("T")


class ErrorCollector:
    """Errors of several checks, each with the recipe key that it is about.

    ``wrong``: keys that are known to be wrong; ``problems``: a sentence for each of these.
    """

    def __init__(self, wrong: Iterable[str] = (), problems: Iterable[str] = ()) -> None:
        self.wrong, self.problems = tuple(wrong), tuple(problems)
        self._errors: list[LLMPruneError] = []

    def attempt(self, place: str, reads: Iterable[str], *, work: Callable[[], T]) -> tuple[bool, T | None]:
        """Return (True, value) of work that depends on the keys ``reads``; (False, None) where it fails or is skipped.

        An LLMPruneError is collected, with ``place`` in front of its message; one that other work has raised too, once.
        Work that depends on a wrong key is skipped.
        """
        if any(_overlap(key, wrong) for key in reads for wrong in self.wrong):
            return False, None
        try:
            return True, work()
        except LLMPruneError as error:
            placed = _placed(place, error)
            if str(placed) not in map(str, self._errors):
                self._errors.append(placed)
            return False, None

    def raise_all(self, source: str = "") -> None:
        """Raise a single error as it is, several as one RecipeError; return where there is none."""
        if len(self._errors) == 1 and not self.problems:
            raise self._errors[0]
        if self.found:
            raise RecipeError([*self.problems, *self.listed()], source)

    @property
    def found(self) -> bool:
        """True if there is any problem."""
        return bool(self.problems or self._errors)

    def listed(self) -> list[str]:
        """Return a sentence for each problem that the checks found."""
        return [
            problem
            for error in self._errors
            for problem in (error.problems if isinstance(error, RecipeError) else [str(error)])
        ]


def run_checks(inputs: TextInputs, errors: ErrorCollector, *, elsewhere: bool) -> None:
    """Run every check of a recipe, and collect the errors.

    ``elsewhere``: the run will be on another machine or have other GPUs, so that devices and tools are not checked.
    """
    passed: set[str] = set()
    if not elsewhere:
        placed = ("devices", "model.device_map", "model.max_memory")
        errors.attempt("devices", placed, work=lambda: require_devices(inputs.recipe))
        if inputs.recipe.export.gguf:
            errors.attempt("export.gguf", ("export", "model"), work=lambda: require_gguf(inputs.recipe))
    if inputs.recipe.export.requantize:
        errors.attempt("export.requantize", ("export", "model"), work=lambda: require_quantized(inputs.recipe.model))
    for check in checks_of(inputs):
        ready = all(name in passed for name in check.after)
        if ready and errors.attempt(check.place, check.reads, work=check.run)[0]:
            passed.add(check.name)


def checks_of(inputs: TextInputs) -> list[Check]:
    """Return the checks for a recipe, ordered so that each follows the checks in its ``after``."""
    recipe, evaluation = inputs.recipe, inputs.recipe.evaluation
    model = ("model",)
    found = [Check("config", "model", model, lambda: inputs.config), *text_checks("calibration", inputs)]
    if inputs.needs_tokenizer:
        found.insert(1, Check("tokenizer", "model", model, lambda: require_tokenizer(recipe.model), ("config",)))
    if recipe.calibration.source_key is not None:
        keys, several = ("calibration",), partial(_require_several, recipe.calibration)
        found.append(Check("sources", "calibration", keys, several, ("calibration files",)))
    if evaluation.perplexity:
        found += text_checks("evaluation.perplexity", inputs)
    found += recovery_checks(inputs)
    found += vocabulary_checks(inputs)
    if recipe.reference != recipe.model:
        key = key_of_reference(recipe)
        against = (key, f"{key}_revision", *model)
        found.append(Check("against", key, against, lambda: ids_in_reference(recipe), ("config",)))
        hidden = "recover.hidden_states"
        layers = partial(require_matching_layers, recipe)
        found.append(Check("hidden states", hidden, (hidden, *against), layers, ("config",)))
    samples = keys_in("calibration", "samples", "tokens", "key")
    found.append(Check("processes", "calibration.samples", samples, lambda: _require_windows(recipe)))
    if recipe.budget:
        judging = partial(require_windows_to_search, recipe.calibration)
        found.append(Check("search windows", "budget", ("budget", "calibration"), judging, ("calibration files",)))
    if recipe.layer_criterion:
        enough = partial(recipe.layer_criterion.require_samples, recipe.calibration.shape()[0])
        found.append(Check("depth samples", "depth.criterion", ("depth", *samples), enough))
        if recipe.calibration.scored_sources > 1:
            by_source = partial(_require_all_sources, recipe.layer_criterion, recipe.calibration)
            reads: tuple[str, ...] = ("depth", "calibration")
            found.append(Check("depth sources", "depth.criterion", reads, by_source, ("calibration files",)))
    if evaluation.speed:
        fits = partial(require_positions, evaluation.speed)
        reads = ("evaluation.speed", *model)
        found.append(Check("speed", "evaluation.speed", reads, lambda: fits(inputs.config), ("config",)))
    found += _prompt_checks(inputs)
    tasks = ("evaluation.tasks", "evaluation.suite", "evaluation.include_path", "evaluation.backend")
    found.append(Check("tasks", "evaluation", tasks, lambda: check_tasks(evaluation)))
    if evaluation.gate and evaluation.gate.needs_tasks and not evaluation.task_names:
        reads = ("evaluation.gate", "evaluation.tasks", "evaluation.suite")
        found.append(Check("judged", "evaluation.gate", reads, _refuse_gate_without_tasks))
    return found


def _prompt_checks(inputs: TextInputs) -> list[Check]:
    """Return the check that there are as many prompts as the recipe asks for, where a plan can know that."""
    evaluation, place = inputs.recipe.evaluation, "evaluation.generation"
    generation, held_out = evaluation.generation, evaluation.perplexity
    if generation is None:
        return []
    if generation.prompts == "held_out":
        if held_out is None or not length_is_known(held_out):
            return []
        reads = (place, *keys_in("evaluation.perplexity", "samples", "sequence_length", "tokens"))
        return [Check("generation", place, reads, partial(require_windows, generation, held_out.shape()))]
    if not (evaluation.requires_generation and inputs.has_own_tokenizer) or (
        held_out and not is_readable(held_out, inputs)
    ):
        return []
    after = ("config", "tokenizer", *(["evaluation.perplexity text"] if held_out else []))
    return [Check("generation", place, (place, "model"), lambda: inputs.prompts, after)]


def _require_windows(recipe: Recipe) -> None:
    require_windows_for_all(recipe.calibration.shape()[0])


def _require_several(calibration: Calibration) -> None:
    """Raise RecipeError where ready tokens have a single source and scores by source are to be combined."""
    if calibration.stored_sources() is not None and not calibration.combines_several(calibration.read_sources):
        raise RecipeError(f"calibration: combine: {calibration.combine} {NEEDS_SEVERAL}")


def _require_all_sources(criterion: DepthCriterion, calibration: Calibration) -> None:
    """Raise CalibrationError where a criterion of layers does not see every source that is scored apart."""
    sources_N = sources_of_windows(calibration)
    if sources_N is not None:
        criterion.require_sources(sources_N.bincount().tolist())


def _refuse_gate_without_tasks() -> None:
    raise RecipeError(
        "evaluation.gate: there is no task to judge by; name lm-eval tasks in evaluation.tasks, or set evaluation.suite"
    )


def _overlap(one: str, other: str) -> bool:
    """Check whether two keys are equal, or one is inside the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _placed(place: str, error: LLMPruneError) -> LLMPruneError:
    """Return the error with ``place`` in front of each sentence that does not start with a key."""

    def named(sentence: str) -> str:
        return sentence if _starts_with_a_key(sentence) else f"{place}: {sentence}"

    if isinstance(error, RecipeError):
        return RecipeError([named(problem) for problem in error.problems], error.source)
    message = named(str(error))
    return error if message == str(error) else type(error)(message)


def _starts_with_a_key(sentence: str) -> bool:
    """Check that a sentence starts with an option, a section of the recipe, or a key of one; file names are neither."""
    if sentence.startswith("--"):
        return True
    start = re.match(r"(\w+)(?::|\.(\w+))", sentence)
    field = Recipe.model_fields.get(start[1]) if start else None
    if start is None or field is None:
        return False
    return start[2] is None or any(start[2] in model.model_fields for model in models_in(field.annotation))
