"""Process that runs lm-eval tasks with a backend: python -m llmprune.evaluation.lm_eval.worker JOB"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmprune.common.errors import LLMPruneError
from llmprune.data.begin_of_text import begin_token
from llmprune.evaluation.lm_eval.backend import ERROR_PREFIX
from llmprune.evaluation.lm_eval.harness import run_tasks
from llmprune.evaluation.lm_eval.store import ResultStore
from llmprune.recipe.evaluation import Evaluation


def main(job: str) -> None:
    """Run the job file that ``run_backend`` wrote, and write the results."""
    from lm_eval.api.registry import get_model

    content = json.loads(Path(job).read_text(encoding="utf-8"))
    evaluation, earlier = (
        content[name] and Evaluation.model_validate(content[name], strict=False) for name in ("evaluation", "earlier")
    )
    stored = content["store"]
    store = ResultStore(Path(stored[0]), *stored[1:]) if stored else None

    def load_lm() -> Any:
        assert evaluation.backend is not None
        backend = get_model(evaluation.backend.name)
        lm = backend.create_from_arg_obj(content["arguments"], {"batch_size": evaluation.batch_size})
        if "add_bos_token" not in content["arguments"]:
            begin_texts_as_tokenizer(lm)
        return lm

    try:
        results = run_tasks(load_lm, evaluation, store=store, earlier=earlier)
    except LLMPruneError as error:
        sys.exit(ERROR_PREFIX + " ".join(str(error).splitlines()))
    Path(content["results"]).write_text(results.to_json(), encoding="utf-8")


def begin_texts_as_tokenizer(lm: Any) -> None:
    """Have a backend begin prompts with the begin-of-text token where its tokenizer does.

    lm-eval's models decide this by their ``add_bos_token``: None, as for ``hf`` and ``vllm``, leaves it to the
    tokenizer; False, the default of endpoints and of SGLang, never adds the token.
    """
    tokenizer = getattr(lm, "tokenizer", None)
    never = getattr(lm, "add_bos_token", None) is False
    if never and isinstance(tokenizer, PreTrainedTokenizerBase) and begin_token(tokenizer) is not None:
        lm.add_bos_token = True


if __name__ == "__main__":
    main(*sys.argv[1:])
