"""The questions next to the editor: common settings of a recipe as inputs, read from its YAML and written back to it.

Settings without an input stay unchanged in the recipe, and so does the recipe where no answer has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from llmprune.common.errors import RecipeError
from llmprune.common.nested import value_at
from llmprune.recipe.yaml_reader import Document, dump, read, read_value
from llmprune.service.recipe_policy.yaml_limits import refuse_costly
from llmprune.service.web.new_job.repairs import LOOK, look_values, repair_of, repair_values
from llmprune.service.web.new_job.uses import HUB, OWN, own_text, text_of, use_of

_Place = tuple[str, ...]  # keys from the outermost section inwards
_PLACES: dict[str, _Place] = {
    "model": ("model", "id"),
    "dtype": ("model", "dtype"),
    "dataset": ("calibration", "dataset"),
    "config": ("calibration", "config"),
    "split": ("calibration", "split"),
    "samples": ("calibration", "samples"),
    "sequence_length": ("calibration", "sequence_length"),
    "keep": ("budget", "parameters"),
    "layers": ("depth", "remove"),
    "width": ("width", "mlp"),
    "tokens": ("recover", "tokens"),
    "held_out": ("evaluation", "perplexity", "split"),
    "suite": ("evaluation", "suite"),
    "task_folder": ("evaluation", "include_path"),
    "gate": ("evaluation", "gate", "min_retention"),
}
_PERPLEXITY = ("evaluation", "perplexity")
_SHARED = (
    "dataset",
    "config",
    "samples",
    "sequence_length",
)  # keys in which the held-out text follows the calibration text
_ALTERNATIVES = {
    "layers": ("depth", ("keep", "layers")),
    "width": ("width", ("neurons",)),
    "tokens": ("recover", ("hours",)),
    "dataset": ("calibration", ("mix", "sources")),
}  # other keys for the same setting
_SIZES = ("depth", "width", "experts", "hidden")  # sections that a budget stands in place of
_KEEP = "75"  # percent of the parameters, where a size is chosen first
_OF_TEXT = ("dataset", "config", "split", "samples", "sequence_length", "held_out", "suite")  # a use sets these
_OF_OWN_TEXT = ("dataset", "config", "split")  # asked for the user's own text alone
_CHOICES = ("use", "source", "repair")  # a change of one of them changes other answers too
_OF_LOOK = {*_CHOICES, "by", "held_out"}  # after a change of one of them a first look sets its values anew


class RecipeForm(BaseModel):
    """Answers of the form. Every field is the text of an input; an empty text means that the key is not set."""

    model_config = ConfigDict(extra="ignore", frozen=True, str_max_length=500)

    model: str = ""
    dtype: str = "auto"
    use: str = ""  # name of a Use
    source: Literal["hub", "here"] = HUB  # of the use's text: HUB or HERE
    dataset: str = ""
    config: str = ""
    split: str = ""
    samples: str = ""
    sequence_length: str = ""
    by: str = ""  # "size": a budget; otherwise layers and widths
    keep: str = ""  # percent of the parameters
    layers: str = ""
    width: str = ""
    repair: str = ""  # name of a Repair
    tokens: str = ""
    held_out: str = ""
    suite: str = ""
    tasks: str = ""
    task_folder: str = ""
    speed: str = ""  # "on"
    gate: str = ""


def form_of(text: str) -> RecipeForm | None:
    """Fill in the form from a recipe; return None where the text is no mapping of sections yet."""
    document = _read(text)
    return None if document is None else _filled_in(document.data)


def apply_form(text: str, answers: RecipeForm) -> str:
    """Return the recipe with the changed answers of the form. Raises RecipeError where it cannot be read.

    Comments and order are kept where only values change; where keys are added or removed, the YAML is written anew.
    """
    document = _read(text)
    if document is None:
        raise RecipeError("the recipe is no YAML that the form could change; correct it in the editor first", "recipe")
    data, before = document.data, _filled_in(document.data)
    answers = _of_the_use(_of_one_kind(answers, before), before)
    names = [name for name in RecipeForm.model_fields if getattr(answers, name) != getattr(before, name)]
    if not names:
        return text
    changes: dict[_Place, Any] = {}
    for name in names:
        for place, value in list(_values(data, name, answers=answers)):
            _set(data, place, value=value)
            changes[place] = value
    if answers.repair == LOOK and _OF_LOOK & set(names):
        for place, value in list(look_values(data)):
            _set(data, place, value=value)
            changes[place] = value
    spliced = _spliced(text, document.root, changes=changes)
    return spliced if _reads_as(spliced, data) else dump(data)


def _of_one_kind(answers: RecipeForm, before: RecipeForm) -> RecipeForm:
    """Leave out the answers of the inputs that the page hides: the size, or layers and widths."""
    if not answers.by:
        return answers.model_copy(update={"keep": ""})
    first = {"keep": answers.keep or _KEEP} if not before.by else {}
    return answers.model_copy(update={"layers": "", "width": ""} | first)


def _of_the_use(answers: RecipeForm, before: RecipeForm) -> RecipeForm:
    """Keep the text as it is where another use is chosen, because its inputs still show the text of the use before."""
    if (answers.use, answers.source) == (before.use, before.source):
        return answers
    kept = {name: getattr(before, name) for name in _OF_TEXT if name != "dataset" or answers.use != OWN}
    return answers.model_copy(update=kept)


def follows(text: str, answers: RecipeForm, *, before: RecipeForm | None) -> RecipeForm | None:
    """Return the form as a composed recipe fills it in, if a choice has changed other answers of the page; else None.

    ``before``: the form of the recipe that the answers were applied to.
    """
    after = form_of(text)
    if after is None or before is None or after == answers:
        return None
    has_chosen = any(getattr(after, name) != getattr(before, name) for name in _CHOICES)
    return after if has_chosen else None


def _filled_in(data: dict[str, Any]) -> RecipeForm:
    answers = {name: _text(value_at(data, place)) for name, place in _PLACES.items()}
    tasks = value_at(data, ("evaluation", "tasks"))
    answers["tasks"] = ", ".join(map(_text, tasks)) if isinstance(tasks, list) else ""
    answers["speed"] = "on" if value_at(data, ("evaluation", "speed")) else ""
    answers["by"] = "size" if data.get("budget") is not None else ""
    answers["keep"] = _percent(value_at(data, _PLACES["keep"]))
    answers["repair"] = repair_of(data)
    answers["use"], answers["source"] = use_of(data.get("calibration"))
    if answers["use"] != OWN:
        answers |= dict.fromkeys(_OF_OWN_TEXT, "")
    return RecipeForm(**{name: answer[:500] for name, answer in answers.items() if answer})


def _values(data: dict[str, Any], name: str, *, answers: RecipeForm) -> Iterator[tuple[_Place, Any]]:
    """Return the places that an answer sets, and their values; None: the key is removed."""
    answer = getattr(answers, name)
    if name == "by":
        yield from (((section,), None) for section in (_SIZES if answer else ("budget",)) if section in data)
    elif name == "keep":
        percent = _value(answer)
        yield _PLACES[name], round(percent / 100, 6) if isinstance(percent, int | float) else percent
    elif name in ("use", "source"):
        yield from _text_values(data, answers)
    elif name == "repair":
        text = text_of(answers.use, answers.source)
        yield from repair_values(data, answer, tokens=answers.tokens, source=answers.source, text=text)
    elif name == "tasks":
        yield ("evaluation", "tasks"), [task.strip() for task in answer.split(",") if task.strip()] or None
    elif name == "speed":
        yield ("evaluation", "speed"), {"new_tokens": 32} if answer else None
    elif name == "held_out" and not answer:
        yield _PERPLEXITY, None
    elif name == "held_out" and value_at(data, _PERPLEXITY) is None:
        text = data.get("calibration")
        shared = {key: text[key] for key in _SHARED if key in text} if isinstance(text, dict) else {}
        yield _PERPLEXITY, shared | {"split": answer}
    else:
        yield from _plain_values(data, name, answer=answer)


def _plain_values(data: dict[str, Any], name: str, *, answer: str) -> Iterator[tuple[_Place, Any]]:
    """Return the place of an answer that is one value, and those of other keys for the same setting."""
    value = None if (name, answer) in (("dtype", "auto"), ("layers", "0")) else _value(answer)
    if name == "tokens" and data.get("recover") is None:
        return  # without a distillation the number of its tokens is not asked
    if name in _SHARED and value_at(data, (*_PERPLEXITY, name)) == value_at(data, _PLACES[name]) is not None:
        yield (*_PERPLEXITY, name), value
    section, others = _ALTERNATIVES.get(name, ("", ()))
    yield from (((section, other), None) for other in others if value_at(data, (section, other)) is not None)
    yield _PLACES[name], value


def _text_values(data: dict[str, Any], answers: RecipeForm) -> Iterator[tuple[_Place, Any]]:
    """Return calibration text, held-out text and suite of a use. One's own text is set once it is named."""
    is_own = answers.use == OWN
    text = text_of(answers.use, answers.source)
    if is_own and answers.dataset and use_of(data.get("calibration"))[0] != OWN:
        text = own_text(answers.dataset)
    if text is None:
        return
    yield ("calibration",), dict(text.calibration)
    yield _PERPLEXITY, dict(text.perplexity)
    yield _PLACES["suite"], text.suite


def _read(text: str) -> Document | None:
    """Read a recipe; return None where it is costly to read, not valid, repeats a key, or is no mapping."""
    try:
        refuse_costly(text)
        document = read(text)
    except RecipeError:
        return None
    return document if isinstance(document.data, dict) and not document.repeated else None


def _reads_as(text: str, data: dict[str, Any]) -> bool:
    """Return whether a YAML text has these values."""
    try:
        return bool(read_value(text) == data)
    except RecipeError:
        return False


def _set(data: dict[str, Any], place: _Place, *, value: Any) -> None:
    """Set a value, or with None remove it and the sections that become empty."""
    head, *rest = place
    if rest:
        inner = data[head] if isinstance(data.get(head), dict) else {}
        _set(inner, tuple(rest), value=value)
        value = inner or None
    if value is None:
        data.pop(head, None)
    else:
        data[head] = value


def _spliced(text: str, root: yaml.Node | None, *, changes: Mapping[_Place, Any]) -> str:
    """Replace plain values in the text at their places, from the last to the first."""
    found = []
    for place, value in changes.items():
        node = _node_at(root, place)
        if isinstance(node, yaml.ScalarNode) and value is not None and not isinstance(value, list | dict):
            found.append((node.start_mark.index, node.end_mark.index, value))
    for begin, end, value in sorted(found, key=lambda change: change[0], reverse=True):
        text = text[:begin] + dump(value, width=1_000).removesuffix("...\n").strip() + text[end:]
    return text


def _node_at(root: yaml.Node | None, place: _Place) -> yaml.Node | None:
    node = root
    for key in place:
        entries = node.value if isinstance(node, yaml.MappingNode) else ()
        node = next((inner for name, inner in entries if name.value == key), None)
    return node


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, dict | list) else str(value)


def _percent(value: Any) -> str:
    """Return a fraction of the parameters in percent; nothing for another budget."""
    return f"{value * 100:.6g}" if isinstance(value, float) and 0 < value <= 1 else ""


def _value(text: str) -> int | float | str | None:
    """Convert a text to a number where it is one. The recipe's own check reports any other text."""
    text = text.strip()
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
