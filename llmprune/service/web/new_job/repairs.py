"""Answers to "how much time?": how much is searched, on how much text, and how the kept weights are repaired."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmprune.common.nested import value_at
from llmprune.service.web.new_job.uses import HERE, HUB, Text

LOOK, CLOSED, BLOCK, DISTILLATION, NONE = "look", "", "block", "distillation", "off"
FIRST_TOKENS = {HUB: "20M", HERE: "50K"}  # of a distillation, by where its text comes from; here there is little
_SEVERAL = ("up", "block")  # keys of refit that the block-by-block repair sets
_WINDOWS = {"samples": 16, "sequence_length": 128}  # of a first look
_ANSWERS = {"samples": 8, "new_tokens": 32}  # that both models generate in a first look
_LIMIT = 20  # samples of a task in a first look
_SECTIONS = (("calibration",), ("evaluation", "perplexity"))  # with windows
_GENERATION, _OF_TASKS, _QUICK = ("evaluation", "generation"), ("evaluation", "limit"), ("budget", "quick")

Changes = Iterator[tuple[tuple[str, ...], Any]]  # places in a recipe, and their values; None: the key is removed


@dataclass(frozen=True)
class Repair:
    """A way to search and to repair. ``costs``: what it costs and gives, in a sentence."""

    name: str
    label: str
    costs: str


REPAIRS = (
    Repair(
        LOOK,
        "A first look",
        f"Little text ({_WINDOWS['samples']} pieces), at most 6 shapes, compared without a repair. It shows how it "
        "works; the model is likely to keep less than by the answers below.",
    ),
    Repair(
        CLOSED,
        "Standard: solve once",
        "More text, up to 20 shapes, the best ones repaired before they are compared. The weights that stay are solved "
        "anew in closed form. For a model that you mean to use, start here.",
    ),
    Repair(
        BLOCK,
        "More: train block by block",
        "Standard, then every layer is trained towards the original one: about 17 more passes over the text; keeps "
        "more.",
    ),
    Repair(
        DISTILLATION,
        "Much: distillation",
        "Standard, then the model is trained on what the original one predicts: hours on a GPU; after a large cut it "
        "keeps most.",
    ),
    Repair(NONE, "No repair", "The cut alone, to compare with."),
)


def repair_of(data: dict[str, Any]) -> str:
    """Return the name of the answer that a recipe stands for."""
    if data.get("recover") is not None:
        return DISTILLATION
    refit = data.get("refit")
    if refit is False:
        return NONE
    if isinstance(refit, dict) and refit.get("block"):
        return BLOCK
    return LOOK if _is_look(data) else CLOSED


def _is_look(data: Mapping[str, Any]) -> bool:
    """Return whether a recipe's search is quick, or, where it searches nothing, its text that of a first look."""
    budget, text = data.get("budget"), data.get("calibration")
    if isinstance(budget, dict):
        return budget.get("quick") is True
    return isinstance(text, dict) and all(text.get(key) == value for key, value in _WINDOWS.items())


def repair_values(data: dict[str, Any], repair: str, *, tokens: str, source: str, text: Text | None) -> Changes:
    """Return the places that an answer sets, and their values.

    ``text``: of the use, whose windows a recipe has again after a first look; None for one's own text.
    """
    refit, recover = data.get("refit"), data.get("recover")
    if _is_look(data):
        yield from _without_look(data, text)
    if repair != DISTILLATION and recover is not None:
        yield ("recover",), None
    if repair == DISTILLATION and recover is None:
        yield ("recover", "tokens"), tokens or FIRST_TOKENS[source]
    if repair == NONE:
        yield ("refit",), False
    elif refit is False:
        yield ("refit",), None
    if repair == BLOCK:
        yield from ((("refit", key), True) for key in _SEVERAL)
    elif repair in (CLOSED, LOOK) and isinstance(refit, dict):
        yield from ((("refit", key), None) for key in _SEVERAL if key in refit)


def look_values(data: dict[str, Any]) -> Changes:
    """Return the places that a first look sets, and their values."""
    if isinstance(data.get("budget"), dict):
        yield _QUICK, True
    yield from (((*_GENERATION, key), value) for key, value in _ANSWERS.items())
    if value_at(data, ("evaluation", "suite")) or value_at(data, ("evaluation", "tasks")):
        yield _OF_TASKS, _LIMIT
    for section in _SECTIONS:
        if value_at(data, section) is not None:
            yield from (((*section, key), value) for key, value in _WINDOWS.items())


def _without_look(data: dict[str, Any], text: Text | None) -> Changes:
    yield _QUICK, None
    if value_at(data, _GENERATION) == _ANSWERS:
        yield _GENERATION, None
    if value_at(data, _OF_TASKS) == _LIMIT:
        yield _OF_TASKS, None
    whole = (text.calibration, text.perplexity) if text else ({}, {})
    for section, given in zip(_SECTIONS, whole, strict=True):
        if value_at(data, section) is not None:
            yield from (((*section, key), given.get(key)) for key in _WINDOWS)
