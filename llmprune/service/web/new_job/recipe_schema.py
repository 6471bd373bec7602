"""Schema of a recipe for completion in the editor: without the keys that are refused over HTTP, with known names."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from fastapi.responses import Response

from llmprune.recipe.mixes import mix_names
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.suites import suites
from llmprune.service.recipe_policy.rules import CLOSED_SECTIONS
from llmprune.service.web.responses import page_router

router = page_router()

_REFUSED = (("ModelSource", "trust_remote_code"), ("ModelSource", "pickles"))


@router.get("/submit/schema")
def schema() -> Response:
    """Return the schema as JSON."""
    return Response(_schema(), media_type="application/json")


@cache
def _schema() -> bytes:
    data: dict[str, Any] = Recipe.model_json_schema()
    sections = data["$defs"]
    for section, key in _REFUSED:
        del sections[section]["properties"][key]
    for closed in CLOSED_SECTIONS:
        section, _, key = closed.rpartition(".")
        owner = sections[type(Recipe.model_fields[section].default).__name__] if section else data
        del owner["properties"][key]
    for section, key, values in (
        ("Calibration", "mix", mix_names()),
        ("RecoveryText", "mix", mix_names()),
        ("Evaluation", "suite", list(suites())),
    ):
        properties = sections[section]["properties"]
        properties[key] = {"enum": values, "description": properties[key].get("description", "")}
    return json.dumps(data, separators=(",", ":")).encode()
