"""Tasks by any lm-eval backend (vllm, an OpenAI-style endpoint, …) in a process of its own.

The process is ``worker``. It finds its model in lm-eval's registry, so whatever lm-eval knows can be named. Finished
tasks go to the same store as those of a model in memory, so that an interrupted evaluation continues.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmprune.common.errors import EvaluationError
from llmprune.evaluation.lm_eval.results import TaskResults
from llmprune.evaluation.lm_eval.store import ResultStore
from llmprune.recipe.evaluation import Argument, Backend, Evaluation

_NAMES_A_MODEL = {"model", "pretrained", "base_url"}
WORKER = "llmprune.evaluation.lm_eval.worker"
SAID = "llmprune: "  # how the process begins an error for people


def ask_backend(
    place: str, side: str, *, evaluation: Evaluation, store: ResultStore, earlier: int | None = None
) -> TaskResults:
    """Every task on the model at ``place``; ``earlier`` as in ``run_tasks``.

    Raises EvaluationError with what the backend said last.
    """
    assert evaluation.backend is not None
    with tempfile.TemporaryDirectory(prefix="llmprune-") as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "results.json"
        given = arguments(evaluation.backend, side, place=place)
        asked: dict[str, Any] = {
            "evaluation": evaluation.model_dump(mode="json", exclude={"perplexity", "generation", "speed"}),
            "arguments": given,
            # nobody knows what an endpoint serves tomorrow: nothing of it is kept
            "store": None if "base_url" in given else [str(store.folder.absolute()), store.identity, store.shared],
            "earlier": earlier,
            "results": str(result),
        }
        job.write_text(json.dumps(asked), encoding="utf-8")
        command = [sys.executable, "-m", WORKER, str(job)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode or not result.is_file():
            raise EvaluationError(failure(evaluation.backend.name, done.returncode, said=done.stderr))
        return TaskResults.from_json(result.read_text(encoding="utf-8"))


def arguments(backend: Backend, side: str, *, place: str) -> dict[str, Argument]:
    """The backend's arguments for one of the two models, which is at ``place``."""
    given = {**backend.args, **(backend.dense if side == "dense" else backend.pruned)}
    if not given.keys() & _NAMES_A_MODEL:
        given["pretrained"] = "{model}"
    return {name: value.replace("{model}", place) if isinstance(value, str) else value for name, value in given.items()}


def failure(name: str, code: int, *, said: str) -> str:
    """What to tell a person of a backend that ended with this code and wrote this to stderr."""
    lines = [line for line in said.strip().splitlines() if line.strip()]
    own = next((line.removeprefix(SAID) for line in lines if line.startswith(SAID)), None)
    return own or (
        f"the backend {name} failed (exit code {code}): {lines[-1] if lines else 'it said nothing'}; "
        "check evaluation.backend, and that what it needs is installed and running"
    )
