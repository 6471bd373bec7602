"""State of a hub: users, repositories with their commits, files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

KINDS = {"models": "model", "datasets": "dataset"}
TOKEN = "hf_" + "PlantedSecretOfTheTests1234567890ab"  # of the user of the tests: must never be seen either
SIGNATURE = "X-Amz-Signature=c2lnbmF0dXJl0123456789"  # must never be seen by a person


@dataclass(frozen=True)
class User:
    """User of a token. ``role``: of the token; ``orgs``: role of the user in each organisation."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)
    scopes: tuple[dict[str, Any], ...] | None = None  # of a fine-grained token

    def may_write(self, namespace: str) -> bool:
        """Check whether commits to a namespace are allowed."""
        if self.role == "read":
            return False
        return namespace == self.name or self.orgs.get(namespace) in ("write", "admin", "contributor")


@dataclass(frozen=True)
class File:
    """A file of a commit; a large one lies in the LFS store under its SHA-256."""

    size: int
    blob: str
    content: bytes | None = None
    lfs: str | None = None

    def described(self, path: str) -> dict[str, Any]:
        """Return the description in listings of the hub."""
        listed: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.blob}
        if self.lfs:
            listed["lfs"] = {"oid": self.lfs, "size": self.size, "pointerSize": 134}
        return listed


@dataclass
class Repo:
    """Commits by SHA, each a whole tree, and the refs that point at them."""

    kind: str
    name: str
    private: bool
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, ref: str, tree: dict[str, File], message: str) -> str:
        """Let ``ref`` point at a new commit with this tree."""
        blobs = sorted((path, file.blob) for path, file in tree.items())
        sha = hashlib.sha1(f"{self.name}{ref}{len(self.commits)}{message}{blobs}".encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[ref] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch, tag, pull request or commit; None where there is none."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


def is_large(path: str, size: int) -> bool:
    """Check whether a file is stored through git-LFS, by the main rules of the hub."""
    return path.endswith((".safetensors", ".bin", ".parquet", ".png", ".gguf")) or size > 10_000_000


def blob_of(content: bytes) -> str:
    """Return git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(digest: str, size: int) -> File:
    """Return a large file in the form of a commit."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n"
    return File(size, blob_of(text.encode()), lfs=digest)
