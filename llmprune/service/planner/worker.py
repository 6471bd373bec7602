"""Plans recipes one after another, with transformers imported once: the service itself never imports it.

    python -m llmprune.service.planner.worker

Reads ``{"recipe": TEXT, "overrides": […], "wrong": [KEY, …]}`` as a line, and answers ``{"plan": …}`` or
``{"problems": […]}`` as a line.
"""

from __future__ import annotations

import json
import os
import sys

from llmprune.common.errors import LLMPruneError, RecipeError
from llmprune.common.progress import quiet_libraries
from llmprune.planning.plan import plan_and_check
from llmprune.recipe.recipe import Recipe
from llmprune.service.memory import let_kernel_end_first


def main() -> None:
    """Answer until standard input closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    let_kernel_end_first()
    quiet_libraries()
    for line in sys.stdin:
        asked = json.loads(line)
        answers.write(json.dumps(_answer(asked["recipe"], asked["overrides"], wrong=asked["wrong"])) + "\n")
        answers.flush()


def _answer(text: str, overrides: list[str], *, wrong: list[str]) -> dict[str, object]:
    try:
        found = plan_and_check(Recipe.parse(text, overrides), wrong=wrong)
        if wrong:  # what is wrong with them is known to the service: here the rest is looked at
            return {"problems": found.errors.listed()}
        return {"plan": found.require()[0].model_dump(mode="json")}
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
