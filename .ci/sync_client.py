"""Writes the blocking client of the service from the asynchronous one: ``llmprune/service/client/sync`` from ``aio``.

Every method is written once, with async and await; this removes both. Run it after a change: make client.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parents[1] / "llmprune" / "service" / "client"
FILES = ("account.py", "client.py", "connection.py", "job.py", "models.py", "sweeps.py", "uploads.py", "users.py")
HEAD = "# Made from aio/{name} by make client; change that file.\n"
_RULES = (
    (r"\basync (def|with|for)\b", r"\1"),
    (r"(?<!\w)\(await ((?:[^()]|\([^()]*\))*)\)", r"\1"),
    (r"\bawait ", ""),
    (r"\bin ``async with``", "in ``with``"),
    (r"\bclient\.aio\b", "client.sync"),
    (r"\b(Async)(?=Client|JobHandle|Connection|Iterator|BaseTransport|[A-Z][a-z]+Methods)", ""),
    (r"\basync(?=contextmanager)", ""),
    (r"\b__a(?=enter__|exit__)", "__"),
    (r"\ba(?=iter_bytes\b|close\b)", ""),
)


def sync_source(name: str) -> str:
    """Return the source of a file of the blocking client, formatted."""
    source = (CLIENT / "aio" / name).read_text(encoding="utf-8")
    for pattern, replacement in _RULES:
        source = re.sub(pattern, replacement, source)
    ruff = [sys.executable, "-m", "ruff"]
    name = str(CLIENT / "sync" / name)
    for command in (["check", "--quiet", "--fix-only", "--select=I"], ["format"]):
        arguments = [*ruff, *command, "--stdin-filename", name, "-"]
        source = subprocess.run(arguments, input=source, capture_output=True, text=True, check=True).stdout
    return HEAD.format(name=Path(name).name) + source


def main() -> None:
    """Write the files of the blocking client."""
    for name in FILES:
        (CLIENT / "sync" / name).write_text(sync_source(name), encoding="utf-8")


if __name__ == "__main__":
    main()
