"""Worker process that plans recipes, so that the service itself never imports transformers.

    python -m llmprune.service.planner.worker

It reads ``{"recipe": TEXT, "overrides": […], "wrong": [KEY, …]}`` as a line, and answers with ``{"plan": …}`` or
``{"problems": […]}`` as a line. To ``{"variants": [[TEXT, […]], …]}`` it answers with ``{"times": […]}``: for each
recipe the seconds of its run and whether all of its parts are counted, or null.
"""

from __future__ import annotations

import json
import os
import sys

from llmprune.common.errors import LLMPruneError, RecipeError
from llmprune.common.libraries import quiet_libraries
from llmprune.planning.plan import plan_and_check
from llmprune.planning.timing import expected_durations, with_expected_durations
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
        if "variants" in asked:
            answer: dict[str, object] = {"times": [_time(*variant) for variant in asked["variants"]]}
        else:
            answer = _answer(asked["recipe"], asked["overrides"], wrong=asked["wrong"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(text: str, overrides: list[str], *, wrong: list[str]) -> dict[str, object]:
    try:
        recipe = Recipe.parse(text, overrides)
        found = plan_and_check(recipe, wrong=wrong, elsewhere=True)
        if wrong:  # the service has reported these keys: the plan reports only problems of the rest
            return {"problems": found.errors.listed()}
        return {"plan": with_expected_durations(found.require()[0], recipe).model_dump(mode="json")}
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


def _time(text: str, overrides: list[str]) -> dict[str, object] | None:
    """Return how long a recipe runs, from the model's config alone: text and tasks are not looked up."""
    try:
        found = expected_durations(Recipe.parse(text, overrides))
    except MemoryError:
        raise
    except Exception:  # the plan of this recipe says what is wrong with it
        return None
    return None if found is None else {"seconds": found.total, "is_complete": not found.unknown}


if __name__ == "__main__":
    main()
