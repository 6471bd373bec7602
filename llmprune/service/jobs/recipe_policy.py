"""What a recipe from the network may name: hub ids, paths under the operator's folders, and nothing else.

Every text in a recipe has a rule here; a text that has none is refused, so that a key which
is new to recipes is closed until somebody has thought about it. Paths become overrides with
absolute paths: the recipe itself stays as it was sent, and the job runs in an empty folder,
where no hub id can be a folder by accident.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from llmprune.common.errors import RecipeError, shortened
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.text_source import FILE_BUILDERS, PACKAGE_SCHEME, PACKAGES
from llmprune.recipe.yaml_reader import NOT_YAML, dump
from llmprune.service.settings import Settings

# datasets takes these for loaders of files, not for hub ids.
BUILDERS = frozenset({
    "arrow", "audiofolder", "cache", "conll", "csv", "eval", "fasta", "fastq", "folder", "folder_based_builder",
    "genbank", "generator", "harbor", "hdf5", "iceberg", "imagefolder", "json", "lance", "meshfolder", "mmcif",
    "niftifolder", "pandas", "parquet", "pdb", "pdffolder", "spark", "sql", "text", "tsfile", "videofolder", "vortex",
    "webdataset", "xml",
})  # fmt: skip
RECIPE_LIMIT = 32 * 1024  # bytes of a recipe or an override; reading YAML takes about 5 µs a byte
_DEEPEST = 20  # mappings and lists inside each other; a recipe has at most 5
_NAME = r"[A-Za-z0-9](?:[\w-]|\.(?!\.)){0,95}"
_HUB_ID = re.compile(rf"{_NAME}(?:/{_NAME})?", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]{0,120}", re.ASCII)
_WORD = re.compile(r"(?!.*\.\.)[\w.+:,-]{1,120}", re.ASCII)
_TASK = re.compile(r"(?!.*\.ya?ml$)[\w+-][\w.+-]{0,119}", re.ASCII)  # no path and no glob: lm-eval would load both
_COLUMN = re.compile(r"[^/\\\x00-\x1f]{1,120}")
_PATTERN = re.compile(r"\d{1,4}:\d{1,4}", re.ASCII)
_MATRIX = re.compile(r"[\w.*?-]{1,120}", re.ASCII)  # matched against a few dozen names
_SPLIT = re.compile(r"[\w.\[\]:%()+ -]{1,120}", re.ASCII)
_LIST = re.compile(r"\.\d+(?=\.|$)")  # an entry of a list, in a place


@dataclass
class Guard:
    """Collects what is wrong with one recipe, and the overrides that its paths need."""

    settings: Settings
    problems: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # the keys that the problems are about
    overrides: list[str] = field(default_factory=list)

    def check(self, recipe: Recipe) -> None:
        """Hold every text of a recipe against its rule."""
        if recipe.model.trust_remote_code:
            self.note("model.trust_remote_code", "is never run here; remove it")
        for section, given in zip(CLOSED, (recipe.evaluation.backend, recipe.hub), strict=True):
            if given is not None:
                instead = ", and push the finished job with a token of its own" if section == "hub" else ""
                self.note(section, f"is not accepted over the network; remove it{instead}")
        for place, value in texts_in(recipe):
            if place.startswith(tuple(f"{section}." for section in CLOSED)):
                continue  # said once, for the whole section
            rule = RULES.get(_LIST.sub("[]", place)) or _mapping_rule(place)
            if rule is None:
                self.note(place, "is not accepted over the network; remove it")
            else:
                rule(self, place, value)

    def refuse(self, place: str, value: str, *, remedy: str) -> None:
        """Note that a value is not allowed."""
        self.note(place, f"{value[:80]!r} is not allowed here; {remedy}")

    def note(self, place: str, said: str) -> None:
        """Note a problem with the key at a place."""
        self.refused.append(place)
        self.problems.append(f"{place}: {said}")

    def path(self, place: str, value: str, *, wish: str, file: bool) -> None:
        """A file, or else a folder, that really lies under one of the roots, whatever links say."""
        found = [inside for root in self.settings.allow_roots if (inside := _inside(value, root)) is not None]
        if found and found[0].is_relative_to(self.settings.data_dir.resolve()):
            self.refuse(place, value, remedy="the service's own folder holds other people's jobs")
        elif found and found[0].is_file() == file:
            self.overrides.append(f"{place}={json.dumps(str(found[0]))}")
        else:
            self.refuse(place, value, remedy=wish)


Rule = Callable[[Guard, str, str], None]


def admit(text: str, overrides: Sequence[str], *, settings: Settings) -> tuple[Recipe, list[str]]:
    """The recipe, and the overrides to run it with. Raises RecipeError that lists what is not allowed."""
    examined = examine(text, overrides, settings=settings)
    if examined.problems or examined.recipe is None:
        raise RecipeError(examined.problems, "recipe")
    return examined.recipe, examined.overrides


@dataclass(frozen=True)
class Examined:
    """A recipe after its schema and the service's policy were asked, and what of it may be planned."""

    recipe: Recipe | None  # without the keys that are wrong or refused; None where too little is left
    text: str
    overrides: list[str]  # to run or plan ``text`` with
    problems: list[str]
    wrong: tuple[str, ...]  # keys that were left out


def examine(text: str, overrides: Sequence[str], *, settings: Settings) -> Examined:
    """Hold a recipe against schema and policy, and list all problems of both.

    Raises RecipeError for text that is too costly to read, or is no mapping.
    """
    _refuse_costly_parts(text, overrides)
    reading = Recipe.read(text, overrides)
    if reading.recipe is None:
        return Examined(None, text, [], reading.problems, reading.wrong)
    guard = Guard(settings)
    guard.check(reading.recipe)
    problems = [*reading.problems, *guard.problems]
    if not problems:
        return Examined(reading.recipe, text, [*overrides, *guard.overrides], [], ())
    rest = reading.without(re.sub(r"\.\d+(?=\.|$).*", "", place) for place in guard.refused)
    allowed = Guard(settings)
    if rest.recipe is not None:
        allowed.check(rest.recipe)
    recipe = None if allowed.problems else rest.recipe
    return Examined(recipe, dump(rest.data), allowed.overrides, shortened(problems, len(problems)), rest.wrong)


def _refuse_costly_parts(text: str, overrides: Sequence[str]) -> None:
    refuse_costly(text)
    for override in overrides:
        place, _, value = override.partition("=")
        refuse_costly(value)
        if place.count(".") > _DEEPEST:
            raise RecipeError(f"--set: a key is nested more than {_DEEPEST} deep", "recipe")


def texts_in(value: Any, annotation: Any = None, *, place: str = "") -> Iterator[tuple[str, str]]:
    """Where each free text that was given stands, and the text; where a fixed choice is all there is, none."""
    if isinstance(value, BaseModel):
        for name in sorted(value.model_fields_set):
            inner = type(value).model_fields[name].annotation
            yield from texts_in(getattr(value, name), inner, place=f"{place}.{name}" if place else name)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts_in(inner, annotation, place=f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from texts_in(inner, annotation, place=f"{place}.{index}")
    elif isinstance(value, str) and is_free_text(annotation):
        yield place, value


def may_be_path(place: str) -> bool:
    """Whether a text at this place of a recipe may name a file or folder."""
    return RULES.get(_LIST.sub("[]", place)) in (_hub_or_path, _tokens_file, _task_folder)


def is_free_text(annotation: Any) -> bool:
    """Whether a field of this type can hold any text, in itself or in a list or mapping."""
    return annotation is str or (
        get_origin(annotation) is not Literal and any(is_free_text(inner) for inner in get_args(annotation))
    )


def refuse_costly(text: str) -> None:
    """Refuse YAML that costs much more than its size, by RecipeError: a few hundred bytes of aliases and merge keys can
    stand for gigabytes, and PyYAML's work grows with the square of the depth (100,000 brackets took it 16 minutes)."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > RECIPE_LIMIT:
        raise RecipeError(f"{size:,} bytes; over the network at most {RECIPE_LIMIT:,} are read", "recipe")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise RecipeError("YAML aliases (*name) are not read over the network; write the values out", "recipe")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise RecipeError(f"brackets or mappings are nested more than {_DEEPEST} deep", "recipe")
    except NOT_YAML:
        return  # the recipe's own reader says what is wrong


def _inside(value: str, root: Path) -> Path | None:
    """Where a path leads, if that is under the root and there."""
    if "\0" in value or value.startswith("~"):
        return None
    place, root = (root / value).resolve(), root.resolve()
    return place if place.is_relative_to(root) and os.path.exists(place) else None  # False for a name that is too long


def _is_path(value: str) -> bool:
    return value.startswith(("/", ".", "~")) or "\\" in value


def _hub_or_path(guard: Guard, place: str, value: str) -> None:
    """A hub id, one of PACKAGES, or what lies under ``--allow-root``: a model's folder, a file of text."""
    roots = guard.settings.allow_roots
    data = place.endswith("dataset")
    if value in PACKAGES:
        return
    if "://" in value or value.startswith(PACKAGE_SCHEME.rstrip("/")):
        guard.refuse(place, value, remedy="no URLs: give a hub id such as org/name")
    elif (
        _is_path(value)
        or (data and Path(value).suffix in FILE_BUILDERS)
        or any(_inside(value, root) is not None for root in roots)
    ):
        guard.path(place, value, wish=f"give a hub id{_or_under(roots, 'a file' if data else 'a folder')}", file=data)
    elif not _HUB_ID.fullmatch(value) or (data and value in BUILDERS):
        guard.refuse(place, value, remedy="give a hub id such as org/name")


def _tokens_file(guard: Guard, place: str, value: str) -> None:
    roots = guard.settings.allow_roots
    guard.path(place, value, wish=f"name calibration text instead{_or_under(roots, 'a file')}", file=True)


def _or_under(roots: Sequence[Path], what: str) -> str:
    opened = f", or {what} of the folders that the operator has opened, by its path there"
    return opened if roots else "; no folder is open to recipes"


def task_folders(settings: Settings) -> dict[str, Path]:
    """The folders of task files that recipes may name, by the names that clients know them by."""
    folders = {folder.name: folder.resolve() for folder in settings.allow_tasks}
    clash = len(folders) < len(settings.allow_tasks)
    return {f"tasks-{n}": folder.resolve() for n, folder in enumerate(settings.allow_tasks)} if clash else folders


def _task_folder(guard: Guard, place: str, value: str) -> None:
    """Task files run code: only the very folders that the operator trusts, by name or by path."""
    trusted = task_folders(guard.settings)
    asked = trusted.get(value) or (Path(value).resolve() if "\0" not in value else None)
    if asked in trusted.values():
        guard.overrides.append(f"{place}={json.dumps(str(asked))}")
    else:
        guard.refuse(
            place, value, remedy="task files run code, so only the service's operator can name a folder of them"
        )


def _form(pattern: re.Pattern[str], wish: str) -> Rule:
    def rule(guard: Guard, place: str, value: str) -> None:
        if not pattern.fullmatch(value):
            guard.refuse(place, value, remedy=wish)

    return rule


def _mapping_rule(place: str) -> Rule | None:
    """The rule of a mapping's values, such as ``model.device_map.lm_head``."""
    return next((rule for head, rule in _MAPPINGS.items() if place.startswith(f"{head}.")), None)


_word = _form(_WORD, "give a plain word")
_TEXT: dict[str, Rule] = {
    "dataset": _hub_or_path,
    "revision": _form(_REVISION, "give a branch, tag or commit"),
    "config": _word,
    "split": _form(_SPLIT, "give a split such as train[:80%]"),
    "text_field": _form(_COLUMN, "give the name of a column"),
    "messages_field": _form(_COLUMN, "give the name of a column"),
}
RULES: dict[str, Rule] = {
    "model.id": _hub_or_path,
    "model.revision": _form(_REVISION, "give a branch, tag or commit"),
    "model.device_map": _word,
    "sparsity.pattern": _form(_PATTERN, 'give N:M, such as "2:4"'),
    "sparsity.targets[]": _form(_MATRIX, "give the name of a matrix, or a pattern with * and ?"),
    "sparsity.skip[]": _form(_MATRIX, "give the name of a matrix, or a pattern with * and ?"),
    "evaluation.tasks[]": _form(_TASK, "give the name of an lm-eval task"),
    "evaluation.include_path": _task_folder,
} | {
    f"{section}{entry}.{name}": rule
    for section in ("calibration", "evaluation.perplexity")
    for entry in ("", ".sources[]")
    for name, rule in (_TEXT | {"tokens": _tokens_file, "key": _form(_COLUMN, "give the name of a tensor")}).items()
}
_MAPPINGS: dict[str, Rule] = {"model.device_map": _word, "evaluation.metrics": _word}
# No rule, so refused: a backend's arguments are addresses and code (model_args, trust_remote_code); a push at the end
# of a run would go out with the rights of whoever started the service, or need a token that lies here for hours.
# Finished jobs are pushed instead (POST /v1/jobs/{job}/push).
CLOSED = ("evaluation.backend", "hub")
