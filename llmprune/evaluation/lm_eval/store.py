"""Finished tasks on disk, a file each: an interrupted evaluation continues, and a base model is asked once.

A file holds under which fingerprint it was made: the model, the task with its files and data, the settings. A result
is taken only where all of that is the same, so dense and pruned, or two settings, never mix.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from llmprune.common.errors import DiskError
from llmprune.common.files import write_text
from llmprune.evaluation.lm_eval.results import TaskResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResultStore:
    """The results of one model in a folder. ``identity``: what they depend on beside the task and its settings."""

    folder: Path
    identity: str
    shared: bool = False  # with other models and settings: then the file's name has the fingerprint

    def get(self, task: str, fingerprint: str) -> TaskResult | None:
        """The task's result, where it is there under this fingerprint and can be read."""
        path = self._path(task, fingerprint)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["fingerprint"] != self._whole(fingerprint):
                return None
            return TaskResult.model_validate(found["result"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            logger.warning("%s cannot be used (%s): the task runs again", path, error)
            return None

    def put(self, result: TaskResult, fingerprint: str) -> None:
        """Keep a finished task. Where the folder cannot be written, that is said and the work goes on."""
        path = self._path(result.task, fingerprint)
        kept = {"fingerprint": self._whole(fingerprint), "result": result.model_dump(mode="json")}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(kept) + "\n")
        except (OSError, DiskError) as error:
            logger.warning("the result of %s is not kept for another time: %s", result.task, error)

    def _whole(self, fingerprint: str) -> str:
        return hashlib.sha256(f"{self.identity} {fingerprint}".encode()).hexdigest()

    def _path(self, task: str, fingerprint: str) -> Path:
        name = re.sub(r"[^\w.-]", "_", task)[:100]
        return self.folder / (f"{name}-{self._whole(fingerprint)[:20]}.json" if self.shared else f"{name}.json")


def baselines_folder() -> Path:
    """The user's cache of base models' results, under HF_HOME."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "llmprune" / "baselines"
