"""Parts of a run folder that another job may need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# model/ with the report, which names what it was pruned from; the run folder without it; the whole run folder
Part = Literal["model", "scores", "run"]
_REPORT = "report.json"


@dataclass(frozen=True)
class Use:
    """Files of a job that another job needs until it has ended."""

    job: str
    part: Part

    def includes(self, name: str) -> bool:
        """Return whether a file belongs to the part. ``name``: its path in the run folder."""
        first = name.split("/")[0]
        if first.endswith(".partial"):
            return False
        return self.part == "run" or name == _REPORT or (first == "model") == (self.part == "model")
