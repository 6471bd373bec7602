"""Plans recipes one after another, with transformers imported once: the service itself never imports it.

    python -m llmprune.service.plan_worker

Reads ``{"recipe": TEXT, "overrides": […]}`` as a line, answers ``{"plan": …}`` or ``{"problems": […]}`` as a line.
"""

from __future__ import annotations

import json
import os
import sys

from llmprune.errors import LLMPruneError, RecipeError
from llmprune.plan import make_plan
from llmprune.progress import quiet_libraries
from llmprune.recipe import Recipe
from llmprune.service.memory import let_kernel_end_first


def main() -> None:
    """Answer until standard input closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    let_kernel_end_first()
    quiet_libraries()
    for line in sys.stdin:
        asked = json.loads(line)
        answers.write(json.dumps(_answer(asked["recipe"], asked["overrides"])) + "\n")
        answers.flush()


def _answer(text: str, overrides: list[str]) -> dict[str, object]:
    try:
        return {"plan": make_plan(Recipe.parse(text, overrides)).model_dump(mode="json")}
    except RecipeError as error:
        return {"problems": error.problems}
    except LLMPruneError as error:
        return {"problems": [str(error)]}
    except MemoryError:
        raise  # the process ends, and with it what the plan holds
    except Exception as error:  # transformers raises anything on a strange config; the next recipe must be answered
        return {"problems": [f"the plan failed: {type(error).__name__}: {error}"]}


if __name__ == "__main__":
    main()
