"""Divergences of the cuts that a search has tried, kept in a file so that a search that is stopped continues.

Shapes: S sources, C cuts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.files import write_text
from llmprune.cut.decision import Cut
from llmprune.search.choice import Divergences


@dataclass
class Trials:
    """Divergences by source of cuts, by the round of the search; every process has the same.

    ``path``: file that they are kept in; ``origin``: fingerprint of all that they depend on. A file with another origin
    is begun anew.
    """

    path: Path
    origin: str
    _known: dict[str, Divergences] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the file."""
        self._known = broadcast_from_first(self._read() if is_first_process() else {})

    def together(
        self, name: str, cuts: Sequence[Cut], *, judge: Callable[[Sequence[Cut]], Tensor]
    ) -> list[Divergences]:
        """Return the divergences of cuts in a round, computed together for those that are not known.

        ``judge``: returns them [S, C].
        """
        missing = [cut for cut in cuts if _key(name, cut) not in self._known]
        if missing:
            found_SC = broadcast_from_first(judge(missing).T.tolist())
            for cut, found_S in zip(missing, found_SC, strict=True):
                self._known[_key(name, cut)] = tuple(found_S)
            self._write()
        return [self._known[_key(name, cut)] for cut in cuts]

    def alone(self, name: str, cut: Cut, *, judge: Callable[[Cut], Tensor]) -> Divergences:
        """Return the divergences of one cut in a round. ``judge``: computes them [S] where they are not known."""
        return self.together(name, [cut], judge=lambda cuts: judge(cuts[0]).unsqueeze(1))[0]

    def _read(self) -> dict[str, Divergences]:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["origin"] != self.origin:
                return {}
            return {key: tuple(map(float, values)) for key, values in stored["trials"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _write(self) -> None:
        if is_first_process():
            write_text(self.path, json.dumps({"origin": self.origin, "trials": self._known}, indent=1) + "\n")


def _key(name: str, cut: Cut) -> str:
    """Return the name of a trial: its units follow from their numbers, as all cuts are chosen from the same scores."""
    return f"{name}: {list(cut.layers)} {sorted(cut.widths.items())} {cut.kv_groups} {cut.num_experts}"
