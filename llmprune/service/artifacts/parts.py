"""Parts of a run folder that another job may need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["model", "scores", "run"]  # model/ alone; the run folder without it; the whole run folder


@dataclass(frozen=True)
class Use:
    """Files of a job that another job needs until it has ended."""

    job: str
    part: Part

    def includes(self, name: str) -> bool:
        """Return whether a file belongs to the part. ``name``: its path in the run folder."""
        first = name.split("/")[0]
        return not first.endswith(".partial") and (self.part == "run" or (first == "model") == (self.part == "model"))
