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
        return self.part == "run" or name.startswith("model/") == (self.part == "model")
