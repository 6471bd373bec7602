"""Run lm-eval's tasks with one of its backends, in a process: python -m llmprune.evaluation.lm_eval.worker JOB"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llmprune.common.errors import LLMPruneError
from llmprune.evaluation.lm_eval.backend import SAID
from llmprune.evaluation.lm_eval.harness import run_tasks
from llmprune.evaluation.lm_eval.store import ResultStore
from llmprune.recipe.evaluation import Evaluation


def main(job: str) -> None:
    """Run the job that ``ask_backend`` wrote, and write its results."""
    from lm_eval.api.registry import get_model

    asked = json.loads(Path(job).read_text(encoding="utf-8"))
    evaluation = Evaluation.model_validate(asked["evaluation"], strict=False)
    kept = asked["store"]
    store = ResultStore(Path(kept[0]), *kept[1:]) if kept else None

    def open_model() -> Any:
        assert evaluation.backend is not None
        backend = get_model(evaluation.backend.name)
        return backend.create_from_arg_obj(asked["arguments"], {"batch_size": evaluation.batch_size})

    try:
        results = run_tasks(open_model, evaluation, store=store, earlier=asked["earlier"])
    except LLMPruneError as error:
        sys.exit(SAID + " ".join(str(error).splitlines()))
    Path(asked["results"]).write_text(results.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
