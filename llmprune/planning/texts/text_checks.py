"""Checks of a recipe's texts: that files exist, windows fit, and there is enough of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmprune.common.errors import LLMPruneError, RecipeError
from llmprune.data.begin_of_text import required_begin
from llmprune.data.sources import local_bytes, require_present
from llmprune.data.window_sources import require_shares
from llmprune.planning.texts.text_inputs import TextInputs
from llmprune.planning.vocabulary.choice import is_quick, vocabulary_sources
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.recipe import Recipe

# A plan reads local text up to this size, and so finds too little text, a missing column or a wrong encoding.
READ_WHOLE = 32 * 10**6  # bytes of all sources together
READ_TOKENS = 2 * 10**6  # of a training; of a longer one a plan reads a few windows


@dataclass(frozen=True)
class Check:
    """Check of a recipe that plan and run make before weights are read.

    ``place``: the key that its message is about; ``reads``: the keys that it depends on; ``after``: names of checks
    that must have passed, because otherwise it would repeat their messages.
    """

    name: str
    place: str
    reads: tuple[str, ...]
    run: Callable[[], object]
    after: tuple[str, ...] = ()


def text_checks(place: str, inputs: TextInputs) -> list[Check]:
    """Return the checks of one section of text: that its files exist, its windows fit, and its content suffices."""
    held_out = place != "calibration"
    windows: TokenWindows | None = inputs.recipe.evaluation.perplexity if held_out else inputs.recipe.calibration
    assert windows is not None, "the section is there"
    shape = inputs.recipe.evaluation.perplexity.shape() if held_out and inputs.recipe.evaluation.perplexity else None
    samples, length = shape or inputs.recipe.calibration.read_shape()
    files, size = f"{place} files", f"{place} length"
    origin = keys_in(
        place, "dataset", "sources", "split", "tokens", "key", *([] if held_out else ["mix", "source_key"])
    )

    def read() -> object:
        return inputs.held_out if held_out else inputs.text_windows

    found = [Check(files, place, origin, lambda: _require_files(windows, samples))]
    if length_is_known(windows):
        reads = (*keys_in(place, "sequence_length", "tokens", "key"), "model")
        fits = partial(inputs.require_positions, length)
        found.append(Check(size, f"{place}.sequence_length", reads, fits, ("config",)))
    needed = [] if windows.tokens and windows.bos is not True else ["tokenizer"]
    if windows.bos is True and inputs.has_own_tokenizer:
        reads = (*keys_in(place, "bos"), "model")
        has_begin = partial(_require_begin, windows, inputs)
        found.append(Check(f"{place} begin", f"{place}.bos", reads, has_begin, ("config", *needed)))
    if is_readable(windows, inputs):
        after = ["config", *(check.name for check in found), *needed]
        found.append(Check(f"{place} text", place, (place, "model"), read, tuple(after)))
    return found


def recovery_checks(inputs: TextInputs) -> list[Check]:
    """Return the checks of the training's text: where it is not the calibration's, that its files exist."""
    recover, place = inputs.recipe.recover, "recover.data"
    if recover is None:
        return []
    windows, held_out = inputs.recovery_settings, inputs.recipe.evaluation.perplexity
    found = []
    if not recover.data.is_calibrations:
        reads = keys_in(place, "dataset", "sources", "split", "tokens", "key", "mix")
        found.append(Check(f"{place} files", place, reads, lambda: _require_files(windows, None)))
    reads = (*keys_in(place, "sequence_length", "tokens", "key"), "calibration", "model")
    fits = partial(inputs.require_positions, windows.sequence_length or 0)
    found.append(Check(f"{place} length", f"{place}.sequence_length", reads, fits, ("config",)))
    others = [inputs.recipe.calibration, *([held_out] if held_out else [])]
    if all(is_readable(one, inputs) for one in (windows, *others)):
        texts = ["calibration text", *(["evaluation.perplexity text"] if held_out else [])]
        needed = ["tokenizer"] if inputs.needs_tokenizer else []
        few = recover.generated(windows.sequence_length or 1) + 1
        number = inputs.recovery_number() if recover.tokens and recover.tokens <= READ_TOKENS else few
        read = partial(inputs.recovery_text, number)
        after = (*(check.name for check in found), *texts, *needed)
        found.append(
            Check(f"{place} text", place, ("recover", "calibration", "evaluation.perplexity", "model"), read, after)
        )
    return found


def vocabulary_checks(inputs: TextInputs) -> list[Check]:
    """Return the checks of a vocabulary's text: that its files exist, and of short text that tokens can be removed."""
    recipe = inputs.recipe
    if recipe.vocabulary is None:
        return []
    place, reads = "vocabulary", ("vocabulary", "calibration", "model")
    found = [Check("vocabulary files", "vocabulary.keep_for", reads, lambda: _require_sources(recipe))]
    if recipe.cuts_only_vocabulary and recipe.evaluation.requires_generation:
        found.append(Check("vocabulary answers", "evaluation.generation", (place, "evaluation"), _refuse_answers))
    if inputs.has_own_tokenizer and _is_quick(recipe):
        after = ("config", "tokenizer", "vocabulary files")
        found.append(Check("vocabulary", place, reads, lambda: inputs.vocabulary, after))
    return found


def _refuse_answers() -> None:
    raise RecipeError(
        "evaluation.generation: answers are compared token by token before the vocabulary is cut, and nothing else is; "
        "remove it and bars on greedy agreement, and judge by evaluation.tasks"
    )


def _is_quick(recipe: Recipe) -> bool:
    try:
        return is_quick(recipe)
    except LLMPruneError:  # the check of the files reports it
        return False


def _require_sources(recipe: Recipe) -> None:
    for source in vocabulary_sources(recipe):
        require_present(source)


def _require_begin(windows: TokenWindows, inputs: TextInputs) -> None:
    required_begin(windows.bos, inputs.tokenizer)


def length_is_known(windows: TokenWindows) -> bool:
    """Check that the recipe or a readable file of tokens determines the length of the windows."""
    return not windows.tokens or windows.sequence_length is not None or windows.stored_shape() is not None


def _require_files(windows: TokenWindows, samples: int | None) -> None:
    """Raise RecipeError for local files that do not exist, CalibrationError for sources that would get no window.

    ``samples``: number of windows; None where a source may get none.
    """
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
    if samples is not None:
        require_shares(windows, samples)


def is_readable(windows: TokenWindows, inputs: TextInputs) -> bool:
    """Check that text and tokenizer are on this machine, and the text is small enough for a plan to read it."""
    if windows.tokens:
        return True
    sizes = [local_bytes(source) for source in windows.text_sources()]
    local = [size for size in sizes if size is not None]
    return len(local) == len(sizes) and sum(local) <= READ_WHOLE and inputs.has_own_tokenizer


def keys_in(place: str, *names: str) -> tuple[str, ...]:
    """Return the names of keys in the section ``place``."""
    return tuple(f"{place}.{name}" for name in names)
