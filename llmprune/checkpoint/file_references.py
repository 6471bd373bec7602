"""Check the names in the files of a checkpoint folder, so that transformers opens nothing outside it.

An index, a config and a tokenizer's config are not trusted. transformers follows these names in them:

- ``weight_map`` of an index, and ``transformers_weights`` of a config: weights files, by any path
- ``base_model_name_or_path`` of adapter_config.json, where peft is installed: another model
- attention and expert implementations, ``backbone`` and timm's ``architecture`` of a config: repositories on the hub
- ``auto_map`` with ``--``: the Python code of another repository
- in a tokenizer's config: ``fast_tokenizer_files``, ``*_file``, ``*_spm``, ``vocab``, ``merges``, ``init_inputs``
  (files), the dictionaries of word splitters, the names of chat templates (files that saving writes), and a
  ``tokenizer_class`` that is no tokenizer
- a string in place of the vocabulary or the rules of tokenizer.json and byte_maps.json: a file
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

from llmprune.common.errors import CheckpointError, ModelError
from llmprune.common.files import read_json
from llmprune.common.paths import first_link_outside, is_inside, is_plain_path

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
NOTICES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
TEMPLATES = "additional_chat_templates"
_UNREAD = (  # documents, pictures, pickles, hidden files: never opened by loading, and never copied if they are links
    *("*.md", "README*", "*.html", "*.pdf", "*.ipynb", "*.log", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp"),
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", ".*"),
)

_WORDS = re.compile(r"_?(attn|experts)_implementation\w*|backbone|architecture|mecab_option")
_FILES = re.compile(r"\w*_(file|files|path|dir|spm)|vocab|merges")
_RULES = ("vocab", "merges", "decompose_map", "merge_map")  # transformers opens a string in their place as a file
_LEFT_BEHIND = re.compile(r"\w*_(file|spm)")  # fields of older versions, with paths of the machine that saved them
_TOKENIZER_CLASS = re.compile(r"(?!Rag)\w*Tokenizer(Fast|Base)?|(Tokenizers|Python|SentencePiece|MistralCommon)Backend")


@dataclass(frozen=True, slots=True)
class _Field:
    """An entry of a mapping or list in a JSON value; the key of a list's entry is empty."""

    key: str
    value: Any
    depth: int


def require_own_names(
    folder: Path, shown: str, *, with_code: bool, with_tokenizer: bool, is_adapter: bool = False
) -> None:
    """Raise ModelError where a file of a checkpoint folder is a link out of it, or names something outside it.

    ``shown``: the model's name for the user; ``with_code``: its Python code is trusted, and so is its tokenizer;
    ``with_tokenizer``: its tokenizer is to be loaded, so its files are checked too; ``is_adapter``: it is an adapter,
    whose base is checked on its own. Raises CheckpointError for an index of weights files.
    """
    outside = first_link_outside(_read_entries(folder), folder)
    if outside is not None:
        raise ModelError(
            f"{outside.relative_to(folder).as_posix()!r} of {shown} is a link that leads out of the model's folder, "
            "and only files inside it are read; put the file itself in its place"
        )
    if not is_adapter and (folder / ADAPTER).exists():
        raise ModelError(adapter_problem(shown))
    for path in folder.glob("*.safetensors.index.json"):
        shard_names(path, shown)
    for path in folder.glob("config*.json"):
        _check_config(path, shown, with_code=with_code)
        if with_tokenizer and not with_code:
            _check_class(path, shown)
    if with_tokenizer and not with_code:
        _check_tokenizer(folder, shown)
    _check_code(folder / "tokenizer_config.json", shown, with_code=with_code)


def adapter_problem(shown: str) -> str:
    """Return the reason why a checkpoint with weights and an adapter is refused."""
    return (
        f"{shown} holds an adapter ({ADAPTER}) beside weights of its own, so it is not clear whether these have it in "
        "them already; remove the adapter's files where they have, or the weights to have it merged into its base"
    )


def shard_names(index: Path, shown: str) -> list[str]:
    """Return the weights files that an index at the top of a model's folder names.

    Raises CheckpointError where one is not inside that folder.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{index.name} is no index of weights files ({error}); get a complete checkpoint"
        ) from error
    for name in names:
        if not is_plain_path(name) or not is_inside(index.parent / name, index.parent):
            raise CheckpointError(
                f"{index.name} of {shown} names {str(name)[:80]!r}, which is no file of that model's own folder; "
                "weights are read only from there: correct the index, or get a complete checkpoint"
            )
    return sorted(names)


def unread_fields(folder: Path) -> dict[str, None]:
    """Return the fields of tokenizer_config.json that name files, as options with which transformers ignores them.

    transformers finds a tokenizer's files by their usual names. In these fields older versions left paths of another
    machine, or relative to the working folder, which some tokenizer classes would open.
    """
    fields = read_json(folder / "tokenizer_config.json")
    return {key: None for key in fields if _LEFT_BEHIND.fullmatch(key)} if isinstance(fields, dict) else {}


def _read_entries(folder: Path) -> Iterator[Path]:
    """Yield the entries that loading or saving may read: files, and folders of templates and licences."""
    for entry in folder.iterdir():
        copied = entry.name == TEMPLATES or any(fnmatch(entry.name, pattern) for pattern in NOTICES)
        if entry.is_dir() and copied:
            yield entry
            yield from entry.rglob("*")
        elif not entry.is_dir() and (copied or not any(fnmatch(entry.name, pattern) for pattern in _UNREAD)):
            yield entry


def _check_config(path: Path, shown: str, *, with_code: bool) -> None:
    for field in _fields(read_json(path)):
        key, value = field.key, field.value
        if _WORDS.fullmatch(key) and not _are_words(value):
            _refuse(path, shown, key=key, value=value)
        if key == "transformers_weights" and value is not None:
            if not is_plain_path(value) or not is_inside(path.parent / value, path.parent):
                _refuse(path, shown, key=key, value=value)
            if value.endswith(".index.json") and "/" in value:
                raise ModelError(
                    f"{key} in the {path.name} of {shown} is {value[:80]!r}, an index in a subfolder, and the files "
                    "that it names are read from the model's folder; put the index beside config.json"
                )
    _check_code(path, shown, with_code=with_code)


def _check_class(path: Path, shown: str) -> None:
    """Refuse a class that is no tokenizer: transformers would load the folder with any class of that name."""
    for field in _fields(read_json(path)):
        value = field.value
        is_tokenizer = isinstance(value, str) and _TOKENIZER_CLASS.fullmatch(value)
        if field.key == "tokenizer_class" and value is not None and not is_tokenizer:
            raise ModelError(
                f"tokenizer_class in the {path.name} of {shown} is {str(value)[:80]!r}, and only tokenizer "
                "classes of transformers that read one folder are loaded; correct it, for example to "
                "PreTrainedTokenizerFast if there is a tokenizer.json"
            )


def _check_tokenizer(folder: Path, shown: str) -> None:
    for path in (*folder.glob("tokenizer*.json"), folder / "byte_maps.json"):
        _check_rules(path, shown)
    _check_class(folder / "tokenizer_config.json", shown)
    _check_class(folder / "special_tokens_map.json", shown)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        for field in _fields(read_json(path)):
            key, value = field.key, field.value
            overruled = name == "tokenizer_config.json" and field.depth == 0 and key not in ("vocab", "merges")
            if key == "fast_tokenizer_files":
                wrong = not isinstance(value, list) or not all(map(_is_tokenizer_file, value))
            elif key == "init_inputs":
                wrong = bool(value)
            elif key == "chat_template":
                wrong = not _has_plain_template_names(value)
            elif _WORDS.fullmatch(key):
                wrong = not _are_words(value)
            else:
                wrong = bool(_FILES.fullmatch(key)) and _may_be_opened(value) and not overruled
            if wrong:
                _refuse(path, shown, key=key, value=value)


def _check_rules(path: Path, shown: str) -> None:
    """Refuse a string in place of the vocabulary or the rules, at the top of a file or in its ``model``."""
    content = read_json(path)
    parts = (content, content.get("model")) if isinstance(content, dict) else ()
    for part in (part for part in parts if isinstance(part, dict)):
        for key in _RULES:
            if _may_be_opened(part.get(key)):
                _refuse(path, shown, key=key, value=part[key])


def _check_code(path: Path, shown: str, *, with_code: bool) -> None:
    """Refuse Python code of other repositories. Without trust no code is run, which transformers reports itself."""
    for field in _fields(read_json(path)):
        if with_code and field.key == "auto_map" and "--" in json.dumps(field.value):
            _refuse(path, shown, key=field.key, value=field.value)


def _refuse(path: Path, shown: str, *, key: str, value: object) -> NoReturn:
    raise ModelError(
        f"{key} in the {path.name} of {shown} is {str(value)[:80]!r}, which names something outside the model's own "
        f"files, and only these are read; correct {path.name}, or put the file into the folder"
    )


def _is_tokenizer_file(name: object) -> bool:
    """Check for the name of a tokenizer.json at the top of the folder, which may be of one version of transformers."""
    return is_plain_path(name) and "/" not in str(name) and fnmatch(str(name), "tokenizer*.json")


def _may_be_opened(value: object) -> bool:
    """Check whether ``open`` accepts a value: a file's name, or the number of a file descriptor."""
    return isinstance(value, str | int)


def _has_plain_template_names(value: object) -> bool:
    """Check that the names of chat templates are plain: saving writes a file of that name for each."""
    named = value if isinstance(value, list) else [{"name": key} for key in value] if isinstance(value, dict) else []
    names = [one.get("name") if isinstance(one, dict) else one for one in named]
    return all(is_plain_path(name) and "/" not in str(name) for name in names)


def _are_words(value: object) -> bool:
    """Check that all strings in a value are words, not names of a repository, file or address."""
    texts = [value, *(field.value for field in _fields(value))]
    return not any("/" in text or ":" in text for text in texts if isinstance(text, str))


def _fields(value: object) -> Iterator[_Field]:
    """Yield every entry of the mappings and lists in a JSON value, without recursion."""
    pending = [(value, 0)]
    while pending:
        inner, depth = pending.pop()
        entries: list[tuple[str, Any]] = []
        if isinstance(inner, dict):
            entries = list(inner.items())
        elif isinstance(inner, list):
            entries = [("", one) for one in inner]
        for key, entry in entries:
            yield _Field(key, entry, depth)
            pending.append((entry, depth + 1))
