"""Values of the model library: a model with its labels, changes of labels, selections of a list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field

from llmprune.common.errors import RecipeError
from llmprune.service.jobs.job import Figures, State, Value
from llmprune.service.users.tokens import Caller

Stage = Literal["candidate", "approved", "retired"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Sort = Literal["finished", "name", "base", "parameters", "bytes", "size", "retention", "speed", "stage", "owner"]
Order = Literal["asc", "desc"]
MAX_TAGS, MAX_TAG, MAX_NOTES = 20, 40, 4_000  # tags of a model; characters
_TAG = re.compile(r"[a-z0-9][a-z0-9._:/-]*", re.ASCII)


class Model(Value):
    """A result in the library."""

    id: str = Field(description="Id of the job that made it.")
    name: str
    owner: str
    base: str = Field(description="Model that was pruned.")
    state: State
    stage: Stage
    tags: tuple[str, ...]
    notes: str
    figures: Figures | None
    uploaded: bool = Field(description="A user uploaded its run folder.")
    cleaned: bool = Field(description="The clean-up has deleted its weights.")
    shared: bool = Field(description="Every user with a token may read it.")
    finished: float | None = Field(description="Seconds since 1970.")


class Labels(Value):
    """Change of a model's labels. What is left out stays."""

    stage: Stage | None = None
    tags: tuple[str, ...] | None = Field(None, max_length=MAX_TAGS, description="All tags, in place of earlier ones.")
    add_tags: tuple[str, ...] = Field((), max_length=MAX_TAGS, description="Tags to add.")
    remove_tags: tuple[str, ...] = Field((), max_length=MAX_TAGS, description="Tags to remove.")
    notes: str | None = Field(None, max_length=MAX_NOTES, description="Notes, in place of earlier ones.")


@dataclass(frozen=True)
class ModelQuery:
    """Selection of models for a list, and its order."""

    viewer: str | None  # only the models of this owner and shared ones; None: all
    search: str = ""  # part of the name, the base, a tag or the notes
    stage: Stage | None = None
    tag: str | None = None
    base: str | None = None
    owner: str | None = None
    sort: Sort = "finished"
    order: Order = "desc"
    after: str | None = None  # cursor: the list goes on after this model
    limit: int = 50


@dataclass(frozen=True)
class ModelPage:
    """A page of the library. ``next`` is the query's ``after`` for the next page; None: this is the last."""

    models: list[Model]
    next: str | None


@dataclass(frozen=True)
class Choices:
    """Values that a list can be filtered by, in their order."""

    tags: list[str]
    bases: list[str]
    owners: list[str]


@dataclass(frozen=True)
class HistoryEvent:
    """A change in a job's history. ``data``: the event, with ``by`` and ``changes`` for labels."""

    at: float
    kind: str
    data: dict[str, Any]


def may_label(caller: Caller, owner: str, *, labels: Labels | None = None) -> bool:
    """Return whether a caller may make a change of labels to a model of the owner; None: any change at all.

    Only approvers approve. They may set the stage of every model that they may read, and the owner every other label.
    """
    if labels is None:
        return caller.may_change(owner) or caller.may_approve()
    if labels.stage == "approved" and not caller.may_approve():
        return False
    return caller.may_change(owner) or (caller.may_approve() and labels == Labels(stage=labels.stage))


def new_labels(labels: Labels, model: Model) -> Labels:
    """Return a change without the values that a model has already."""
    return Labels(
        stage=None if labels.stage == model.stage else labels.stage,
        tags=None if labels.tags is not None and checked_tags(labels.tags) == model.tags else labels.tags,
        add_tags=labels.add_tags,
        remove_tags=labels.remove_tags,
        notes=None if labels.notes is not None and labels.notes.strip() == model.notes else labels.notes,
    )


def tags_of(text: str) -> tuple[str, ...]:
    """Return the tags in a text, separated by commas or spaces, sorted and in lower case. Raises RecipeError."""
    return checked_tags(re.split(r"[\s,]+", text.strip())) if text.strip(" ,\t\r\n") else ()


def checked_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Return tags sorted, in lower case, each once. Raises RecipeError."""
    found = sorted({tag.strip().lower() for tag in tags} - {""})
    wrong = [tag for tag in found if len(tag) > MAX_TAG or not _TAG.fullmatch(tag)]
    if wrong:
        raise RecipeError(
            f"tag {wrong[0][:MAX_TAG]!r}: a tag has at most {MAX_TAG} of the letters a-z, digits and . _ : / -, and "
            "begins with a letter or digit",
            "labels",
        )
    if len(found) > MAX_TAGS:
        raise RecipeError(f"{len(found)} tags; a model has at most {MAX_TAGS}", "labels")
    return tuple(found)
