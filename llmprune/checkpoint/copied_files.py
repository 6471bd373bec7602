"""Choose the files of a base that come along with the pruned weights, and copy them byte for byte.

A file is judged by its kind. Weights, what describes them, other formats' folders, code that is not trusted, large
files and this project's own files stay behind; everything else comes along: tokenizers, templates, licences, settings.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from llmprune.checkpoint.file_references import NOTICES, TEMPLATES
from llmprune.common.errors import ModelError
from llmprune.common.paths import is_inside, is_plain_path
from llmprune.common.printing import printable
from llmprune.common.schema import format_size

CONFIG = "config.json"
LARGEST = 64_000_000  # bytes of a file that is no tokenizer's

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ggml|npz|npy|ot|pkl|pickle|joblib|mlmodel|tflite"
    r"|zip|tar|gz|7z)",
    re.IGNORECASE,
)
_CODE = re.compile(r".*\.(py|pyc|ipynb|sh|bat|so|dll|exe|c|cc|cpp|cu|cuh|h|hpp|js)", re.IGNORECASE)
_NAMES_CODE = ("auto_map", "custom_pipelines")  # fields of JSON files
_OF_WEIGHTS = re.compile(  # indexes, checksums, signatures, and what training or quantizing them left
    r".*\.index\.json|.*\.(sha\d+|md5|sig|chk|asc)|(SHA\d+|MD5)SUMS.*|adapter_.*|quantiz\w*config\.json"
    r"|hf_quant_config\.json|trainer_state\.json|training_args.*|\w+_results\.json|imatrix.*",
    re.IGNORECASE,
)
_OURS = ("README*", "llmprune.json", ".*", CONFIG, "config.*.json")
_TOKENIZERS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "spiece*",
    "sentencepiece*",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken*",
)
_SHAPES = {"num_hidden_layers", "n_layers", "n_layer", "num_layers"}  # a JSON file with one of these describes a model
_ELSEWHERE = "lies in a folder of its own: another format"
_ODD_NAME = "its name is no plain path"
_TENSOR = re.compile(r"[\w.]+\.(weight|bias)")


@dataclass(frozen=True)
class Companions:
    """Paths of a base's files, relative to its folder: those that come along, and why each of the others does not."""

    carried: tuple[str, ...]
    left: dict[str, str]


def find_companions(folder: Path, trusted: bool) -> Companions:
    """Judge every file of a base's folder. ``trusted``: its Python code comes along.

    Raises ModelError for a file that should come along and cannot be read.
    """
    carried, left = [], {}
    for path in sorted(_entries(folder, trusted)):
        name = path.relative_to(folder).as_posix()
        reason = _reason(path, folder, trusted=trusted)
        if reason:
            left[printable(name)] = reason
        elif reason is None:
            _require_readable(path, name)
            carried.append(name)
    return Companions(tuple(carried), left)


def copy_companions(folder: Path, companions: Companions, *, target: Path, trusted: bool) -> None:
    """Copy files of a base byte for byte; only names of code that stays behind are removed from JSON files."""
    for name in companions.carried:
        path, copy = folder / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        fields = _fields(path) if path.suffix == ".json" and not trusted else {}
        if without_code(fields, trusted):
            copy.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, copy)


def comes_along(name: str, size: int, *, trusted: bool) -> bool:
    """Check by its path and size whether a file may come along; what is in it can still speak against it."""
    return not _is_ours(name) and _reason_by_name(name, size, trusted=trusted) is None


def judge_names(sizes: Mapping[str, int], trusted: bool) -> Companions:
    """Judge files by their paths and sizes alone, before they are there."""
    others = [name for name in sorted(sizes) if not _is_ours(name) and not _WEIGHTS.fullmatch(name)]
    reasons = {name: _reason_by_name(name, sizes[name], trusted=trusted) for name in others}
    left = {printable(name): reason for name, reason in reasons.items() if reason}
    return Companions(tuple(name for name in others if not reasons[name]), left)


def _reason_by_name(name: str, size: int, *, trusted: bool) -> str | None:
    path = PurePosixPath(name)
    if not is_plain_path(name):
        return _ODD_NAME
    return _reason_of_kind(name, size, trusted=trusted) if _is_reached(path, trusted) else _ELSEWHERE


def without_code(fields: dict[str, Any], trusted: bool) -> bool:
    """Remove the fields that name Python files, in place, unless these are trusted. Returns whether there were any."""
    named = [] if trusted else [name for name in _NAMES_CODE if name in fields]
    for name in named:
        del fields[name]
    return bool(named)


def _entries(folder: Path, trusted: bool) -> Iterator[Path]:
    """Yield what lies at the top of a folder, and the files of those of its folders from which some come along."""
    for entry in folder.iterdir():
        if entry.is_symlink() or not entry.is_dir():
            yield entry
            continue
        inner = [Path(at) / name for at, _, names in os.walk(entry) for name in names]
        some = any(_is_reached(PurePosixPath(path.relative_to(folder)), trusted) for path in inner)
        yield from inner if some else [entry]


def _is_reached(path: PurePosixPath, trusted: bool) -> bool:
    """Check whether a path lies at the top or in a folder of licences or templates, or is trusted code."""
    top = path.parts[0]
    in_known = top == TEMPLATES or any(fnmatch(top, pattern) for pattern in NOTICES)
    is_code = trusted and bool(_CODE.fullmatch(path.name)) and not any(part.startswith(".") for part in path.parts)
    return len(path.parts) == 1 or in_known or is_code


def _is_ours(name: str) -> bool:
    """Check for a file that the result has anew, or that is none of the model's."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _OURS)


def _reason(path: Path, folder: Path, *, trusted: bool) -> str | None:
    """Return why a file does not come along: None if it does, empty if that goes without saying."""
    name = path.relative_to(folder).as_posix()
    if _is_ours(name) or (_WEIGHTS.fullmatch(name) and path.is_file()):
        return ""
    if not is_plain_path(name):
        return _ODD_NAME
    if not path.is_file():
        return _ELSEWHERE if path.is_dir() and not path.is_symlink() else "no regular file"
    if not is_inside(path, folder):
        return "a link that leads out of the model's folder"
    if not _is_reached(PurePosixPath(name), trusted):
        return _ELSEWHERE
    return _reason_of_kind(name, path.stat().st_size, trusted=trusted) or _reason_of_content(path, name)


def _reason_of_kind(name: str, size: int, *, trusted: bool) -> str | None:
    last = PurePosixPath(name).name
    if _WEIGHTS.fullmatch(last):
        return "weights"
    if _OF_WEIGHTS.fullmatch(last):
        return "describes the base's weights"
    if not trusted and _CODE.fullmatch(last):
        return "code, which the recipe does not trust"
    if size > LARGEST and not is_tokenizer(last):
        return f"larger than {format_size(LARGEST)}"
    return None


def _reason_of_content(path: Path, name: str) -> str | None:
    if path.suffix != ".json" or is_tokenizer(name):
        return None
    fields = _fields(path)
    if _SHAPES & fields.keys() or any(map(_names_tensor, [*fields.items(), *fields.values()])):
        return "describes the base's weights"
    return None


def _names_tensor(value: Any) -> bool:
    """Check whether a name of a tensor stands in a value, or right inside it."""
    texts = value if isinstance(value, list | tuple | dict) else ()
    return any(isinstance(text, str) and bool(_TENSOR.fullmatch(text)) for text in texts)


def is_tokenizer(name: str) -> bool:
    """Check by its name for a tokenizer's file."""
    return any(fnmatch(name, pattern) for pattern in _TOKENIZERS)


def _fields(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file; none where it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _require_readable(path: Path, name: str) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ModelError(
            f"{name} of the base model comes along with the result, and it cannot be read ({error.strerror}); "
            "make it readable, or take it out of the folder"
        ) from error
