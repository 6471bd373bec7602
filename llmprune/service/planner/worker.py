"""Worker process that plans recipes, so that the service itself never imports transformers.

    python -m llmprune.service.planner.worker

It reads ``{"recipe": TEXT, "overrides": […], "wrong": [KEY, …]}`` as a line, and answers with ``{"plan": …}`` or
``{"problems": […]}`` as a line.
"""

from __future__ import annotations

import json
import os
import sys

from llmprune.common.errors import LLMPruneError, RecipeError
from llmprune.common.libraries import quiet_libraries
from llmprune.planning.plan import plan_and_check
from llmprune.planning.timing import with_known_durations
from llmprune.recipe.recipe import Recipe
from llmprune.service.memory import let_kernel_end_first


def main() -> None:
    """Answer questions until standard input closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps prints of libraries out of the answers
    let_kernel_end_first()
    quiet_libraries()
    for line in sys.stdin:
        asked = json.loads(line)
        answers.write(json.dumps(_answer(asked["recipe"], asked["overrides"], wrong=asked["wrong"])) + "\n")
        answers.flush()


def _answer(text: str, overrides: list[str], *, wrong: list[str]) -> dict[str, object]:
    try:
        found = plan_and_check(Recipe.parse(text, overrides), wrong=wrong, elsewhere=True)
        if wrong:  # the service has reported these keys: the plan reports only problems of the rest
            return {"problems": found.errors.listed()}
        return {"plan": with_known_durations(found.require()[0]).model_dump(mode="json")}
    except RecipeError as error:
        return {"problems": error.problems}
    except LLMPruneError as error:
        return {"problems": [str(error)]}
    except MemoryError:
        raise  # ends the process and frees its memory
    except (
        Exception
    ) as error:  # transformers can raise anything on an unusual config, and the next recipe needs an answer
        return {"problems": [f"the plan failed: {type(error).__name__}: {error}"]}


if __name__ == "__main__":
    main()
