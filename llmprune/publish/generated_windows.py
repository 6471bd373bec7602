"""Calibration windows that the dense model wrote itself, published with the pruned model.

Sampling repeats only with the same versions and hardware, so a repeated run reads the windows instead. They are JSON,
``{"windows": [[token id, …], …]}``: a loader of checkpoints could take another safetensors file for weights.

Shapes: N windows, L sequence length.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmprune.common.errors import HubError
from llmprune.common.files import write_text
from llmprune.common.hub.client import resolve_revision, with_retries
from llmprune.common.hub.explanations import explain
from llmprune.common.hub.secrets import redact_error
from llmprune.publish.provenance import Record, parse_hub_address

GENERATED = "self-generated.json"  # in the repository
KEY = "windows"


def write_generated(windows: Path, published: Path) -> None:
    """Write the windows of a run's safetensors file as JSON."""
    write_text(published, json.dumps({KEY: load_file(windows)[KEY].tolist()}) + "\n")


def fetch_generated(place: str, record: Record) -> Path | None:
    """Return the file of a pushed model's generated windows; None where its record lists none.

    ``place``: its folder or hub address. Raises HubError if the file cannot be fetched or is not the recorded one.
    """
    if GENERATED not in record.files:
        return None
    folder = Path(place).expanduser()
    path = folder / GENERATED if folder.is_dir() else _download(place)
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error}; its record lists it") from error
    if found != record.files[GENERATED]:
        raise HubError(f"{GENERATED} of {place} has another SHA-256 than its record; ask its author to push it again")
    return path


def read_generated(path: Path, *, vocabulary: int) -> Tensor:
    """Return published windows int64 [N, L]. Raises HubError if they are damaged or have ids beyond the vocabulary."""
    try:
        windows_NL = torch.tensor(json.loads(path.read_text(encoding="utf-8"))[KEY])
        valid = windows_NL.dtype == torch.int64 and windows_NL.ndim == 2 and windows_NL.numel() > 0
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise HubError(f"the generated windows in {path} cannot be read: {error}") from error
    if not valid or int(windows_NL.min()) < 0 or int(windows_NL.max()) >= vocabulary:
        raise HubError(f"the generated windows in {path} are no token ids from 0 to {vocabulary - 1}")
    return windows_NL


def _download(place: str) -> Path:
    from huggingface_hub import hf_hub_download

    repo_id, revision = parse_hub_address(place)
    try:
        commit = str(resolve_revision(repo_id, revision).resolved)
        return Path(with_retries(lambda: hf_hub_download(repo_id, GENERATED, revision=commit)))
    except Exception as error:  # the hub client's errors have no base in common
        redact_error(error)
        raise HubError(f"{GENERATED} of {repo_id} (revision {revision}) cannot be fetched: {explain(error)}") from error
