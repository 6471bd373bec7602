"""Plans of recipes that start from a model which only the artefact store has: outlines take the place of models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.service.artifacts.outline import outline_of_model
from llmprune.service.artifacts.store import ArtifactStore
from llmprune.service.jobs.library.job_models import JobModels


@dataclass(frozen=True)
class Outline:
    """Outline of a model. ``model``: folder that the model itself would have here; ``folder``: of the outline."""

    model: Path
    folder: Path

    def in_overrides(self, overrides: Sequence[str]) -> list[str]:
        """Return overrides with the outline in place of the model."""
        before, after = (f"model.id={json.dumps(str(path))}" for path in (self.model, self.folder))
        return [after if one == before else one for one in overrides]

    def out_of(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return the planner's answer with the model in place of the outline."""
        before, after = (json.dumps(str(path))[1:-1] for path in (self.folder, self.model))
        found: dict[str, Any] = json.loads(json.dumps(answer).replace(before, after))
        return found


def outline_for(model: str, models: JobModels, *, store: ArtifactStore | None) -> Outline | None:
    """Return the outline of a recipe's model that only the store has; None for any other model.

    Raises LLMPruneError where the files that a plan needs cannot be fetched.
    """
    base = models.base_of(model)
    place = models.folder(base.id) if base is not None else None
    if base is None or place is None or store is None or not models.is_only_stored(base.id):
        return None
    return Outline(place, outline_of_model(store, models.settings.folder(base.id)))
