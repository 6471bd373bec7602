"""Routes that check and plan recipes without running them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool

from llmprune.common.errors import RecipeError
from llmprune.recipe.validation_messages import short
from llmprune.recipe.yaml_reader import dump
from llmprune.service.api.dependencies import TheCaller, TheService
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.api.values import Validation
from llmprune.service.recipe_policy.policy import admit, examine
from llmprune.service.recipe_policy.yaml_limits import RECIPE_LIMIT

router = APIRouter(prefix="/v1/recipes", tags=["recipes"])

_YAML = ("application/yaml", "application/x-yaml", "text/yaml")
EXAMPLE = {
    "model": {"id": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "calibration": {"dataset": "allenai/c4", "config": "en", "samples": 128, "sequence_length": 2048},
    "depth": {"remove": 2},
    "width": {"mlp": 0.75},
}
RECIPE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The recipe, as YAML or as JSON.",
        "content": {
            kind: {"schema": {"$ref": "#/components/schemas/Recipe"}, "example": EXAMPLE}
            for kind in ("application/yaml", "application/json")
        },
    }
}


async def recipe_text(request: Request, service: TheService, *, caller: TheCaller) -> str:
    """Return the body as a recipe's YAML. Raises Refused (413, 415) and RecipeError."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in (*_YAML, "application/json"):
        raise Refused(415, "send the recipe as application/yaml or application/json")
    body = await request.body()
    if len(body) > RECIPE_LIMIT:
        raise Refused(413, f"{len(body):,} bytes; a recipe over the network has at most {RECIPE_LIMIT:,}")
    return await service.recipe_queue.run(caller.name, _decoded, body, kind == "application/json")


def _decoded(body: bytes, is_json: bool) -> str:
    """Decode a body to YAML text; JSON is converted, because YAML does not allow its tabs. Raises RecipeError."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError("not UTF-8 text; send the recipe as UTF-8", "recipe") from error
    return _from_json(text) if is_json else text


def _from_json(text: str) -> str:
    try:
        data = json.loads(text, object_pairs_hook=_without_repeats)
        return dump(data)
    except ValueError as error:
        raise RecipeError(f"not valid JSON: {error}", "recipe") from error
    except RecursionError:
        raise RecipeError("not a recipe: brackets are nested hundreds deep", "recipe") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"{short(repeated[0])} is given twice; keep one of them")
    return dict(pairs)


RecipeText = Annotated[str, Depends(recipe_text)]
Overrides = Annotated[
    list[str],
    Query(
        default_factory=list,
        alias="set",
        max_length=100,
        description="Override of a recipe key, as section.key=value; may be repeated.",
    ),
]


@router.post("/validate", openapi_extra=RECIPE_BODY, responses=documented(413, 415, 422))
async def validate(text: RecipeText, overrides: Overrides, *, service: TheService, caller: TheCaller) -> Validation:
    """Check a recipe against its schema and the service's policy; model, text and tasks are checked by the plan."""
    model_of = service.models(caller).folder
    try:
        await service.recipe_queue.run(
            caller.name, admit, text, overrides, settings=service.settings, model_of=model_of
        )
    except RecipeError as error:
        return Validation(valid=False, problems=service.paths.hide_in(error.problems))
    return Validation(valid=True, problems=[])


@router.post("/plan", openapi_extra=RECIPE_BODY, responses=documented(413, 415, 422, 503))
async def plan(text: RecipeText, overrides: Overrides, *, service: TheService, caller: TheCaller) -> dict[str, Any]:
    """Plan a recipe as ``llmprune plan --json`` does: sizes, memory, and every problem that a run would report.

    No weights are read. Problems of the schema, of the service's policy and of the plan are listed together.
    """
    examined = await service.recipe_queue.run(
        caller.name, examine, text, overrides, settings=service.settings, model_of=service.models(caller).folder
    )
    answer = await run_in_threadpool(service.plan, examined, caller)
    problems = [*examined.problems, *answer.get("problems", ())]
    if problems:
        raise RecipeError(problems, "recipe")
    made: dict[str, Any] = answer["plan"]
    return made
