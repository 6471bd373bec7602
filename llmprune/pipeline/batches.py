"""Batch sizes of a run, which its folder keeps so that a resumed run computes with the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from llmprune.common.distributed import broadcast_from_first, is_first_process, least_over_processes
from llmprune.common.out_of_memory import BatchSize
from llmprune.planning.memory.device_memory import BatchSizes
from llmprune.recipe.recipe import Recipe
from llmprune.results.run_folder.folder import RunFolder
from llmprune.results.run_folder.products import BATCH_SIZES


@dataclass(frozen=True)
class Batches:
    """Windows that a layer processes at a time, of the calibration and of the held-out text.

    They are the same in all processes of a run.
    """

    calibration: BatchSize
    held_out: BatchSize

    @classmethod
    def planned(cls, sizes: BatchSizes) -> Batches:
        """Return the batch sizes of a plan."""
        return cls(BatchSize(sizes.calibration), BatchSize(sizes.held_out))

    @property
    def reductions(self) -> list[str]:
        """A sentence for each time that a device ran out of memory."""
        return self.calibration.reductions + self.held_out.reductions

    def settle(self, recipe: Recipe, folder: RunFolder, *, sizes: BatchSizes) -> None:
        """Take the batch sizes in the run folder, which a resumed run began with.

        Those planned are taken where the recipe asks for others than before, and in place of more windows than the
        plan's ``sizes`` say that fit now. Of several processes the least counts.
        """
        asked, fitting = _asked(recipe), {"calibration": sizes.largest, "held_out": sizes.largest_held_out}
        stored = broadcast_from_first(_read(folder, asked) if is_first_process() else {})
        for name, batch in self._named.items():
            batch.number = least_over_processes(batch.number)
            most = max(least_over_processes(fitting[name]), batch.number)
            if name in stored:
                before, batch.reductions = stored[name]["number"], stored[name]["reductions"]
                batch.number = before if before <= most else batch.number
            batch.on_reduction = partial(self._write, folder, asked)
        self._write(folder, asked)

    @property
    def _named(self) -> dict[str, BatchSize]:
        return {"calibration": self.calibration, "held_out": self.held_out}

    def _write(self, folder: RunFolder, asked: list[Any]) -> None:
        values = {name: {"number": one.number, "reductions": one.reductions} for name, one in self._named.items()}
        folder.write(BATCH_SIZES, json.dumps({"recipe": asked} | values, indent=1) + "\n")


def _asked(recipe: Recipe) -> list[Any]:
    """Return the recipe's own batch sizes."""
    held_out = recipe.evaluation.perplexity
    return [recipe.calibration.batch_size, held_out.batch_size if held_out else None]


def _read(folder: RunFolder, asked: list[Any]) -> dict[str, Any]:
    """Return the batch sizes in the run folder; none where it has none, or those of another recipe."""
    try:
        stored: dict[str, Any] = json.loads((folder.path / BATCH_SIZES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if stored.get("recipe") == asked else {}
