"""Evaluation by an lm-eval backend (vllm, an OpenAI-style endpoint, …) in its own process.

The process runs ``worker``, which can use every model class in lm-eval's registry. Finished tasks are stored like those
of a model in memory, so an interrupted evaluation continues.
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

_MODEL_ARGUMENTS = {"model", "pretrained", "base_url"}
WORKER = "llmprune.evaluation.lm_eval.worker"
ERROR_PREFIX = "llmprune: "  # of the line on stderr with an LLMPruneError of the process


def run_backend(
    place: str, side: str, *, evaluation: Evaluation, store: ResultStore, earlier: Evaluation | None = None
) -> TaskResults:
    """Evaluate the model at ``place`` on every task; ``side`` and ``earlier`` as in ``evaluate_tasks``.

    Raises EvaluationError with the last line of the backend's output if it fails.
    """
    from llmprune.common.distributed import environment_of_one

    assert evaluation.backend is not None
    with tempfile.TemporaryDirectory(prefix="llmprune-") as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "results.json"
        given = arguments(evaluation.backend, side, place=place)
        content: dict[str, Any] = {
            "evaluation": _tasks_of(evaluation),
            "arguments": given,
            # the model behind an endpoint may change, so its results are not stored
            "store": None if "base_url" in given else [str(store.folder.absolute()), store.identity, store.shared],
            "earlier": _tasks_of(earlier) if earlier else None,
            "results": str(result),
        }
        job.write_text(json.dumps(content), encoding="utf-8")
        command = [sys.executable, "-m", WORKER, str(job)]
        done = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=environment_of_one(),
        )
        if done.returncode or not result.is_file():
            raise EvaluationError(failure_message(evaluation.backend.name, done.returncode, stderr=done.stderr))
        return TaskResults.from_json(result.read_text(encoding="utf-8"))


def _tasks_of(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.model_dump(mode="json", exclude={"perplexity", "generation", "speed"})


def arguments(backend: Backend, side: str, *, place: str) -> dict[str, Argument]:
    """Return the backend's arguments for the model at ``place``; ``side`` as in ``evaluate_tasks``."""
    given = {**backend.args, **(backend.dense if side == "dense" else backend.pruned)}
    if not given.keys() & _MODEL_ARGUMENTS:
        given["pretrained"] = "{model}"
    return {name: value.replace("{model}", place) if isinstance(value, str) else value for name, value in given.items()}


def failure_message(name: str, code: int, *, stderr: str) -> str:
    """Return the error message for a backend that ended with this exit code and output on stderr."""
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    own = next((line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)), None)
    return own or (
        f"the backend {name} failed (exit code {code}): {lines[-1] if lines else 'no output'}; check "
        "evaluation.backend, and that the backend is installed and running"
    )
