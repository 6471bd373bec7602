"""Results of finished tasks, and greedy answers, in a file each: a base model is evaluated once.

Each file records the fingerprint of its model, task files, data and settings. A result is reused only with the same
fingerprint, so results of different models or settings are never mixed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from llmprune.common.errors import DiskError
from llmprune.common.files import write_text
from llmprune.evaluation.lm_eval.results import TaskResult

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class ResultStore:
    """Results of one model in a folder. ``identity``: the model and everything else they depend on besides the task."""

    folder: Path
    identity: str
    shared: bool = False  # with other models and settings; file names then include the fingerprint

    def get(self, task: str, fingerprint: str) -> TaskResult | None:
        """Return the task's result if it is stored with this fingerprint and can be read."""
        return self.load(task, fingerprint, kind=TaskResult)

    def put(self, result: TaskResult, fingerprint: str) -> None:
        """Store a finished task. If the folder cannot be written, log a warning and continue."""
        self.save(result.task, result, fingerprint=fingerprint)

    def load(self, name: str, fingerprint: str, *, kind: type[T]) -> T | None:
        """Return the result ``name`` if it is stored with this fingerprint and can be read."""
        path = self._path(name, fingerprint)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["fingerprint"] != self._whole(fingerprint):
                return None
            return kind.model_validate(found["result"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            logger.warning("%s cannot be used (%s): the task is evaluated again", path, error)
            return None

    def save(self, name: str, result: BaseModel, *, fingerprint: str) -> None:
        """Store the result ``name``. If the folder cannot be written, log a warning and continue."""
        path = self._path(name, fingerprint)
        content = {"fingerprint": self._whole(fingerprint), "result": result.model_dump(mode="json")}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(content) + "\n")
        except (OSError, DiskError) as error:
            logger.warning("the result of %s cannot be stored for reuse: %s", name, error)

    def _whole(self, fingerprint: str) -> str:
        return hashlib.sha256(f"{self.identity} {fingerprint}".encode()).hexdigest()

    def _path(self, task: str, fingerprint: str) -> Path:
        name = re.sub(r"[^\w.-]", "_", task)[:100]
        return self.folder / (f"{name}-{self._whole(fingerprint)[:20]}.json" if self.shared else f"{name}.json")


def baselines_folder() -> Path:
    """Return the user's cache folder for results of base models, in HF_HOME."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "llmprune" / "baselines"
