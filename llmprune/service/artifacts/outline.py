"""Outline of a model that only the artefact store has, for plans, which read no weights.

Small files are fetched whole. Of each weights file the header is fetched, and written at the beginning of a sparse file
of the same length, which takes no more disk than the header. The outline has a folder of its own, so that nothing takes
it for the model.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from llmprune.common.errors import DiskError, LLMPruneError
from llmprune.service.artifacts.fetch import exclusive
from llmprune.service.artifacts.manifest import Manifest, StoredFile, fetch, local_manifest
from llmprune.service.artifacts.store import ArtifactStore

OUTLINE = "outline"  # folder in the job's folder
_LARGEST = 64 * 10**6  # bytes of a file that is fetched whole
_LARGEST_HEADER = 100 * 10**6  # bytes; the format allows no more
_FIRST = 256 * 1024  # bytes of the first request for a header, which most headers fit in
_AT_A_TIME = 8
_REPORT = "report.json"  # names the models that this one was pruned from


def outline_of_model(store: ArtifactStore, folder: Path) -> Path:
    """Return the folder of a model's outline, made where there is none of its newest version.

    ``folder``: of the job that made the model. Raises StoreUnreachable, DiskError, and LLMPruneError for a file that
    the store lacks, or that is damaged.
    """
    manifest = local_manifest(folder)
    assert manifest is not None, "the store has the model"
    outlines = folder / OUTLINE
    found = outlines / f"{manifest.attempt}-{manifest.number}"
    with _disk_errors(outlines):
        outlines.mkdir(exist_ok=True)
        with exclusive(outlines / "lock"):
            if not found.is_dir():
                for old in [path for path in outlines.iterdir() if path.is_dir()]:
                    shutil.rmtree(old)
                partial = outlines / f"partial-{secrets.token_hex(4)}"
                _write(store, manifest, folder=partial)
                if (folder / "run" / _REPORT).is_file():
                    shutil.copyfile(folder / "run" / _REPORT, partial / _REPORT)
                partial.rename(found)
    return found / "model"


def _write(store: ArtifactStore, manifest: Manifest, *, folder: Path) -> None:
    files = [file for file in manifest.files if file.name.startswith("model/")]
    weights = [file for file in files if file.name.endswith(".safetensors")]
    small = [file for file in files if file not in weights and file.bytes <= _LARGEST]
    damaged = fetch(store, manifest, folder=folder, wanted=lambda file: file in small)
    if damaged:
        raise LLMPruneError(f"the artefact store lacks {damaged[0]}; run the job's recipe again")
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for file, header in zip(weights, pool.map(lambda file: _header(store, file), weights), strict=True):
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(header)
            with path.open("r+b") as opened:
                opened.truncate(file.bytes)
            if file.modified is not None:
                os.utime(path, ns=(file.modified, file.modified))


def _header(store: ArtifactStore, file: StoredFile) -> bytes:
    """Return the beginning of a safetensors file: the length of its header in 8 bytes, and the header."""
    begin = store.read(file.key, begin=0, end=min(file.bytes, _FIRST)) or b""
    end = 8 + int.from_bytes(begin[:8], "little")
    if len(begin) < 8 or end > min(file.bytes, _LARGEST_HEADER):
        raise LLMPruneError(f"{file.name} in the artefact store is absent or damaged; run the job's recipe again")
    rest = store.read(file.key, begin=len(begin), end=end) if end > len(begin) else b""
    return (begin + (rest or b""))[:end]


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{folder} cannot be written: {error}; free some space and plan again") from error
