"""Provenance of a pushed model in ``llmprune.json``, to read, check and reproduce the run.

format          1
created         time of the push, UTC
recipe          the user's YAML, verbatim
overrides       texts of the --set options
cut             kept layers and widths, and a bit for every neuron, expert and key-value group
fingerprints    of every product of the run
files           SHA-256 of every pushed file except the model card
quantized_from  of a quantized result, ORG/NAME@COMMIT of the unquantized one; null for any other
refused         reason of the gate against publishing; null if it was passed or not set
report          figures of report.json: sizes, retention, layers, versions, base commit
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor

from llmprune.checkpoint.local_paths import local_folder
from llmprune.common.errors import HubError
from llmprune.common.hub.client import resolve_revision, with_retries
from llmprune.common.hub.explanations import explain
from llmprune.common.hub.secrets import redact_error
from llmprune.common.paths import is_plain_path
from llmprune.cut.decision import Cut
from llmprune.results.report_schema import Report

FILE = "llmprune.json"
SCHEME = "hub://"
FORMAT = 1
_REPORT = "report.json"
_WANTED = "the hub id of a model pushed by llmprune (org/name), or a folder with its files"
_LEFT_OUT = {
    "recipe",
    "recipe_text",
    "overrides",
    "files",
}  # of a report: recorded separately, or valid on one machine only


class Record(BaseModel):
    """Contents of the file. Unknown keys, added by a later llmprune, are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = FORMAT
    created: str
    recipe: str
    overrides: tuple[str, ...]
    cut: dict[str, Any]
    fingerprints: dict[str, str]
    files: dict[str, str]
    quantized_from: str | None = None
    refused: str | None
    report: dict[str, Any]

    @field_validator("files")
    @classmethod
    def _own_files(cls, files: dict[str, str]) -> dict[str, str]:
        outside = next((name for name in files if not is_plain_path(name)), None)
        if outside is not None:
            raise ValueError(f"it lists the file {outside[:80]!r}, which is not a path in a repository")
        return files

    @classmethod
    def read(cls, text: str, place: str) -> Self:
        """Parse the file's text. Raises HubError if it is invalid or of another format."""
        try:
            data = json.loads(text)
            if isinstance(data, dict) and data.get("format") != FORMAT:
                raise HubError(
                    f"the {FILE} of {place} has format {data.get('format')!r} and this llmprune reads {FORMAT}; "
                    "use the version of llmprune that wrote it"
                )
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise HubError(
                f"the {FILE} of {place} cannot be read: {problem}; ask its author to push it again"
            ) from error
        except (ValueError, RecursionError) as error:
            cause = str(error).splitlines()[0]
            raise HubError(f"the {FILE} of {place} cannot be read: {cause}; ask its author to push it again") from error

    def to_json(self) -> str:
        """Return the file's text."""
        return self.model_dump_json(indent=1) + "\n"


def portable_figures(report: Report) -> dict[str, Any]:
    """Return the figures of a report that are valid on any machine, as JSON data."""
    return report.model_dump(mode="json", exclude=_LEFT_OUT)


def describe_cut(cut: Cut) -> dict[str, Any]:
    """Return a cut as JSON data; what is kept of each kind as rows of base64-encoded bits, index 0 first."""
    return {
        "num_layers": cut.num_layers,
        "keep_layers": list(cut.layers),
        "remove_layers": list(cut.removed),
        "widths": cut.widths,
        "num_experts": cut.num_experts,
        "kv_groups": cut.kv_groups,
        "hidden_size": cut.hidden_size,
        "keep_channels": None if cut.hidden is None else _as_bits(cut.hidden),
        "keep_neurons": {key: _as_bits(keep) for key, keep in cut.neurons.items()},
        "keep_experts": {key: _as_bits(keep) for key, keep in cut.experts.items()},
        "keep_heads": {key: _as_bits(keep) for key, keep in cut.heads.items()},
    }


def _as_bits(keep: Tensor) -> list[str]:
    rows = keep.reshape(-1, keep.shape[-1]).numpy()
    texts = []
    for row in rows:
        bits = np.zeros(int(row.max()) + 1, dtype=np.uint8)
        bits[row] = 1
        texts.append(base64.b64encode(np.packbits(bits).tobytes()).decode())
    return texts


def parse_hub_address(text: str) -> tuple[str, str]:
    """Return repository and revision of ``org/name`` or ``org/name@revision``, with or without ``hub://``."""
    repo_id, _, revision = text.removeprefix(SCHEME).partition("@")
    return repo_id, revision or "main"


def fetch_record(place: str) -> tuple[Record, str]:
    """Return the record of a pushed model and its commit; for a folder, its record and an empty commit.

    Raises HubError if there is no record or it cannot be read, and ModelError for a path that leads to no folder.
    """
    folder = None if place.startswith(SCHEME) else local_folder(place, wanted=_WANTED)
    if folder is not None:
        if not (folder / FILE).is_file():
            raise HubError(_without_record(folder, place))
        return Record.read((folder / FILE).read_text(encoding="utf-8"), place), ""
    repo_id, revision = parse_hub_address(place)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        commit = str(resolve_revision(repo_id, revision).resolved)
        path = with_retries(lambda: hf_hub_download(repo_id, FILE, revision=commit))
    except RemoteEntryNotFoundError as error:
        raise HubError(
            f"{repo_id} (revision {revision}) has no {FILE}: it was not pushed by llmprune; name a model that was"
        ) from error
    except Exception as error:  # the hub client's errors have no base in common
        redact_error(error)
        raise HubError(
            f"there is no folder {place!r}, and as a hub model (revision {revision}) its {FILE} cannot be fetched: "
            f"{explain(error)}"
        ) from error
    return Record.read(Path(path).read_text(encoding="utf-8"), place), commit


def _without_record(folder: Path, place: str) -> str:
    """Explain a folder that has no record."""
    if (folder / _REPORT).is_file():
        return (
            f"{place} is the folder of a run, and a record ({FILE}) is written by a push; see {place}/{_REPORT}, or "
            f"push the model with: llmprune push {place}"
        )
    return f"the folder {place} has no {FILE}: it does not hold a model pushed by llmprune; give {_WANTED}"


def differing_files(repo_id: str, commit: str, *, record: Record) -> dict[str, str]:
    """Compare the files on the hub with the record; return the difference of each file that differs, by its path.

    Downloads only small files: the hub knows the SHA-256 of large ones. Raises HubError.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import sha

    def ask() -> dict[str, Any]:
        return {file.path: file for file in HfApi().get_paths_info(repo_id, list(record.files), revision=commit)}

    try:
        present = with_retries(ask)
        differing = {}
        for name, expected in record.files.items():
            if name not in present:
                differing[name] = "is missing"
                continue
            large = present[name].lfs
            if large is None:
                with open(hf_hub_download(repo_id, name, revision=commit), "rb") as file:
                    actual = sha.sha_fileobj(file).hex()
            else:
                actual = large.sha256
            if actual != expected:
                differing[name] = "has another SHA-256"
        return differing
    except Exception as error:  # the hub client's errors have no base in common
        redact_error(error)
        raise HubError(f"the files of {repo_id} cannot be checked: {explain(error)}") from error
