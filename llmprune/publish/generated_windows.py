"""Windows that the dense model wrote itself, for the calibration and for the training, published with the model.

Sampling repeats only with the same versions and hardware, so a repeated run reads the windows instead. They are JSON,
``{"windows": [[token id, …], …]}``: a loader of checkpoints could take another safetensors file for weights.

Shapes: N windows, L sequence length.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmprune.common.errors import HubError
from llmprune.common.files import sha256_of, write_text
from llmprune.common.hub.client import resolve_revision, with_retries
from llmprune.common.hub.explanations import explain
from llmprune.common.hub.secrets import redact_error
from llmprune.publish.provenance import Record, parse_hub_address
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.products import GENERATED_WINDOWS, RECOVERY_WINDOWS

GENERATED, GENERATED_FOR_RECOVERY = "self-generated.json", "recover-generated.json"  # in the repository
KEY = "windows"


def published_windows(report: Report) -> dict[str, str]:
    """Return the run folder's files of windows that the dense model wrote, by their names in the repository."""
    sources = {GENERATED: report.provenance.calibration_sources}
    if report.recovery:
        sources[GENERATED_FOR_RECOVERY] = report.recovery.sources
    files = {GENERATED: GENERATED_WINDOWS, GENERATED_FOR_RECOVERY: RECOVERY_WINDOWS}
    return {name: files[name] for name, texts in sources.items() if any(source.text is None for source in texts)}


def write_generated(windows: Path, published: Path) -> None:
    """Write the windows of a run's safetensors file as JSON."""
    write_text(published, json.dumps({KEY: load_file(windows)[KEY].tolist()}) + "\n")


def fetch_all_generated(place: str, record: Record) -> dict[str, Path]:
    """Return the files of a pushed model's generated windows that its record lists, by their names in the repository.

    ``place``: the model's folder or hub address. Raises HubError if a file cannot be fetched, or is another than the
    record's.
    """
    names = [name for name in (GENERATED, GENERATED_FOR_RECOVERY) if name in record.files]
    return {name: _fetch(place, record, name=name) for name in names}


def _fetch(place: str, record: Record, *, name: str) -> Path:
    folder = Path(place).expanduser()
    path = folder / name if folder.is_dir() else _download(place, name)
    try:
        found = sha256_of(path)
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error}; its record lists it") from error
    if found != record.files[name]:
        raise HubError(f"{name} of {place} has another SHA-256 than its record; ask its author to push it again")
    return path


def read_generated(path: Path, *, vocabulary: int) -> Tensor:
    """Return published windows int64 [N, L]. Raises HubError if they are damaged or have ids beyond the vocabulary."""
    try:
        windows_NL = torch.tensor(json.loads(path.read_text(encoding="utf-8"))[KEY])
        valid = windows_NL.dtype == torch.int64 and windows_NL.ndim == 2 and windows_NL.numel() > 0
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise HubError(f"the generated windows in {path} cannot be read: {error}; fetch them again") from error
    if not valid or int(windows_NL.min()) < 0 or int(windows_NL.max()) >= vocabulary:
        raise HubError(
            f"the generated windows in {path} are no token ids from 0 to {vocabulary - 1}; ask their author to push "
            "them again"
        )
    return windows_NL


def _download(place: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    repo_id, revision = parse_hub_address(place)
    try:
        commit = str(resolve_revision(repo_id, revision).resolved)
        return Path(with_retries(lambda: hf_hub_download(repo_id, name, revision=commit)))
    except Exception as error:  # the hub client's errors have no base in common
        redact_error(error)
        raise HubError(f"{name} of {repo_id} (revision {revision}) cannot be fetched: {explain(error)}") from error
