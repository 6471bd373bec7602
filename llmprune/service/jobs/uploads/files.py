"""Files of a run folder that an upload may have, and the check of a saved model's files."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any

from pydantic import Field

from llmprune.common.errors import RecipeError
from llmprune.common.paths import is_plain_path
from llmprune.results.run_folder.products import JOURNAL, PRODUCTS, QUANTIZED_MODEL
from llmprune.service.jobs.job import Value

REPORT = "report.json"
MAX_FILES, MAX_NAME, MAX_RECORD = 1_000, 200, 20_000_000  # files; characters of a name; bytes of a JSON or YAML file
_FOLDERS = ("model", "card", "tasks", "gguf", QUANTIZED_MODEL)
_TOP = tuple(
    name for name in (*PRODUCTS, JOURNAL) if name.endswith((".json", ".yaml", ".safetensors", ".txt"))
)  # no pages: the service makes report.html from report.json
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5")
_RECORDS = (".json", ".yaml", ".jinja", ".md", ".txt", ".py")
_MAX_HEADER = 100_000_000  # bytes of a safetensors header, as the library limits it


class UploadFile(Value):
    """A file of a run folder."""

    name: str = Field(max_length=MAX_NAME, description="Path in the run folder, such as model/config.json.")
    bytes: int = Field(ge=0, le=2**50, description="Size in bytes.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of its contents, in hexadecimal digits.")


class FileProgress(Value):
    """A file of an upload."""

    name: str
    bytes: int
    received: int = Field(description="Bytes that have arrived; the next part begins there.")


class Upload(Value):
    """An upload, as far as it is."""

    id: str
    files: tuple[FileProgress, ...]
    job: str | None = Field(None, description="Id of the job that it has become; null: it is not complete.")


def is_run_file(name: str) -> bool:
    """Return whether a finished run folder may have a file of this name that the library keeps."""
    if not is_plain_path(name) or not name.isascii() or len(name) > MAX_NAME:
        return False
    parts = name.split("/")
    if any(not part or part.startswith(".") or part.endswith((".partial", " ")) for part in parts):
        return False
    if len(parts) == 1:
        return name in _TOP
    return parts[0] in _FOLDERS and len(parts) <= 4 and not name.lower().endswith((*_PICKLED, ".html"))


def run_file_of(member: tarfile.TarInfo) -> str | None:
    """Return the name of an archive's member in the run folder; None where the library does not keep it."""
    name = member.name.removeprefix("./")
    is_file = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    return name if is_file and is_run_file(name) else None


def record_problem(name: str, size: int) -> str | None:
    """Return the problem of a JSON or text file that is too large; None where there is none."""
    if not name.endswith(_RECORDS) or size <= MAX_RECORD or name == "model/tokenizer.json":
        return None
    return f"{name}: {size:,} bytes; such a file has at most {MAX_RECORD:,}"


def check_files(files: tuple[UploadFile, ...]) -> None:
    """Raise RecipeError where files are no finished run folder's, with every reason."""
    names = [file.name for file in files]
    problems = [
        f"{name[:80]!r} is no file of a run folder that the library keeps" for name in names if not is_run_file(name)
    ]
    if len(set(names)) < len(names):
        problems.append("a file is listed twice")
    taken = {"/".join(name.split("/")[:end]) for name in names for end in range(1, name.count("/") + 1)} & set(names)
    problems += [f"{name[:80]!r} is a file and a folder" for name in sorted(taken)]
    problems += filter(None, (record_problem(file.name, file.bytes) for file in files))
    for needed in (REPORT, "model/config.json"):
        if needed not in names:
            problems.append(f"{needed} is missing; upload the folder of a finished run")
    if not any(name.startswith("model/") and name.endswith(".safetensors") for name in names):
        problems.append("model has no safetensors file; upload the folder of a finished run")
    if problems:
        raise RecipeError(problems, "upload")


def check_model(folder: Path) -> None:
    """Check that the weights of a saved model are complete, by their headers. Raises RecipeError."""
    shards = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        found = _json(index)
        named = found.get("weight_map") if isinstance(found, dict) else None
        missing = set(map(str, named.values())) - shards if isinstance(named, dict) else {"its list of weights"}
        if missing:
            raise RecipeError(
                f"{folder.name}: {', '.join(sorted(missing)[:5])} missing, which {index.name} names", "upload"
            )
    if not isinstance(_json(folder / "config.json"), dict):
        raise RecipeError(
            f"{folder.name}/config.json is no JSON mapping; upload the folder of a finished run", "upload"
        )
    for shard in sorted(shards):
        _check_shard(folder / shard)


def _check_shard(path: Path) -> None:
    """Raise RecipeError where a safetensors file is shorter or longer than its header says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ValueError("the length of its header")
            header = json.loads(file.read(length))
        tensors = [one for name, one in header.items() if name != "__metadata__"]
        end = max((int(one["data_offsets"][1]) for one in tensors), default=0)
        empty = any(math.prod(one["shape"]) < 0 for one in tensors)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise RecipeError(f"{path.parent.name}/{path.name} is no safetensors file: {error}", "upload") from error
    if empty or 8 + length + end != size:
        raise RecipeError(
            f"{path.parent.name}/{path.name} has {size:,} bytes, and its header says {8 + length + end:,}", "upload"
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path.parent.name}/{path.name} cannot be read: {error}", "upload") from error
