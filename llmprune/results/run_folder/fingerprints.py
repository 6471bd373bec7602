"""Fingerprints of the inputs of products: of values, of files, and of llmprune's own code."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import llmprune


def fingerprint(*parts: object) -> str:
    """Return the SHA-256 of the parts' texts."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """Return the SHA-256 of llmprune's modules, so that products of other code are not reused."""
    digest = hashlib.sha256()
    for path in sorted(Path(llmprune.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def file_fingerprint(*paths: Path) -> str:
    """Return the SHA-256 of the contents of those files that exist."""
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()
