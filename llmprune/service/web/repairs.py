"""Answers to "how much time?": how the weights that stay are repaired after the cut, and trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmprune.service.web.uses import HERE, HUB

CLOSED, BLOCK, DISTILLATION, NONE = "", "block", "distillation", "off"
FIRST_TOKENS = {HUB: "20M", HERE: "50K"}  # of a distillation, by where its text comes from; here there is little
_SEVERAL = ("up", "block")  # keys of refit that the block-by-block repair sets


@dataclass(frozen=True)
class Repair:
    """A way to repair a cut. ``costs``: what it costs and gives, in a sentence."""

    name: str
    label: str
    costs: str


REPAIRS = (
    Repair(
        CLOSED, "Little: solve once", "New weights in closed form, in about the time of the cut itself. Start here."
    ),
    Repair(
        BLOCK,
        "More: train block by block",
        "Every layer is trained towards the dense one: about 17 more passes over the calibration text; keeps more.",
    ),
    Repair(
        DISTILLATION,
        "Much: distillation",
        "The model is trained on what the dense one predicts: hours on a GPU; after a large cut it keeps most.",
    ),
    Repair(NONE, "None", "The cut alone, to compare with."),
)


def repair_of(data: dict[str, Any]) -> str:
    """Return the name of the repair that a recipe asks for."""
    if data.get("recover") is not None:
        return DISTILLATION
    refit = data.get("refit")
    if refit is False:
        return NONE
    return BLOCK if isinstance(refit, dict) and refit.get("block") else CLOSED


def repair_values(
    data: dict[str, Any], repair: str, *, tokens: str, source: str
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Return the places that a repair sets, and their values; None: the key is removed."""
    refit, recover = data.get("refit"), data.get("recover")
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
    elif repair == CLOSED and isinstance(refit, dict):
        yield from ((("refit", key), None) for key in _SEVERAL if key in refit)
