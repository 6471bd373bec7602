"""Answers to "for what use?": the text that each use is calibrated and judged on, and the tasks that score it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmprune.recipe.mixes import DEFAULT_MIX

DEMO_TEXT = "package://pydoc_data.topics/topics"
OWN = "own"  # the use of a text that the user names
# Where a use's text comes from.
HUB: Literal["hub"] = "hub"
HERE: Literal["here"] = "here"
_SMALL = {"samples": 20, "sequence_length": 256}


@dataclass(frozen=True)
class Text:
    """Sections of a recipe for one use: calibration text, held-out text, and a suite of tasks."""

    calibration: Mapping[str, Any]
    perplexity: Mapping[str, Any]
    suite: str | None = None


@dataclass(frozen=True)
class Use:
    """A use of a model. ``gives``: the text and the tasks, for people."""

    name: str
    label: str
    gives: str
    texts: Mapping[str, Text] = field(default_factory=dict)  # by HUB or HERE


def _parts(dataset: str) -> Text:
    """Return the first four fifths of a text for calibration, and the rest to judge."""
    first, rest = ({"dataset": dataset, "split": split} | _SMALL for split in ("train[:80%]", "train[80%:]"))
    return Text(first, rest)


USES = (
    Use(
        "general",
        "General",
        "Web pages, encyclopaedia, code, mathematics, dialogue, several languages. Tasks: knowledge, common sense, "
        "arithmetic, instructions.",
        {
            HUB: Text({"mix": "general"}, {"dataset": "allenai/c4", "config": "en", "split": "validation"}, "general"),
            HERE: _parts(DEMO_TEXT),
        },
    ),
    Use(
        "code",
        "Code",
        "Mostly Python. Judged by its perplexity on other code: tasks of code would run what the model wrote.",
        {
            HUB: Text({"mix": "code"}, {"dataset": "codeparrot/codeparrot-clean-train", "text_field": "content"}),
            HERE: Text(
                {"dataset": "package://asyncio/*.py"} | _SMALL, {"dataset": "package://scipy/special/*.py"} | _SMALL
            ),
        },
    ),
    Use(
        "mathematics",
        "Mathematics",
        "Mostly pages with formulas. Tasks: word problems and school mathematics.",
        {
            HUB: Text(
                {"mix": "mathematics"},
                {"dataset": "openai/gsm8k", "config": "main", "split": "test", "text_field": "answer"}
                | {"samples": 16, "sequence_length": 1024},
                "mathematics",
            ),
            HERE: _parts("package://lm_eval/tasks/bbh/cot_fewshot/*.yaml"),
        },
    ),
    Use(
        "chat",
        "Chat",
        "Mostly dialogue. Tasks: instructions, common sense, knowledge. Its text is on the hub alone.",
        {
            HUB: Text(
                {"mix": "chat"},
                {"dataset": "HuggingFaceH4/ultrachat_200k", "split": "test_sft", "messages_field": "messages"},
                "chat",
            )
        },
    ),
    Use(OWN, "My own text", "A data set on the hub, or a file on the service's machine. You choose the tasks."),
)
_BY_NAME = {use.name: use for use in USES}


def use_of(calibration: Any) -> tuple[str, str]:
    """Return the use that a calibration section stands for, and where its text comes from."""
    if calibration is None:
        return DEFAULT_MIX, HUB
    if not isinstance(calibration, dict):
        return OWN, HUB
    if not any(calibration.get(key) for key in ("dataset", "sources", "tokens")):
        name = calibration.get("mix") or DEFAULT_MIX
        return (name if name in _BY_NAME else OWN), HUB
    for use in USES:
        if HERE in use.texts and calibration.get("dataset") == use.texts[HERE].calibration["dataset"]:
            return use.name, HERE
    return OWN, HUB


def text_of(use: str, source: str) -> Text | None:
    """Return the text of a use; from the hub where the service has none itself. None for one's own text."""
    texts = _BY_NAME[use].texts if use in _BY_NAME else {}
    return texts.get(source) or texts.get(HUB)


def own_text(dataset: str) -> Text:
    """Return the sections for a text that the user names: most of it for calibration, the rest to judge."""
    return Text({"dataset": dataset, "split": "train[:80%]"}, {"dataset": dataset, "split": "train[80%:]"})
