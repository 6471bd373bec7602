"""Depth-and-width pruning of large language models.

    from llmprune import Recipe, run
    report = run(Recipe.load("recipe.yaml"))

Names are imported on first use, so that ``llmprune --help`` and errors in a recipe do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmprune.common.errors import (
        AccessDenied,
        CalibrationError,
        CheckpointError,
        DeviceError,
        DeviceMemoryError,
        DiskError,
        EvaluationError,
        GateNotMet,
        HubError,
        JobFailed,
        LLMPruneError,
        ModelError,
        NotFound,
        NumericalError,
        OutputError,
        PeerError,
        RecipeError,
        ServiceBusy,
        ServiceError,
        ServiceUnreachable,
        StateConflict,
        VerificationError,
    )
    from llmprune.pipeline.run import run
    from llmprune.planning.plan import make_plan
    from llmprune.planning.plan_schema import Plan
    from llmprune.recipe.recipe import Recipe
    from llmprune.results.notebook.report_page import ReportPage
    from llmprune.results.report_schema import Report
    from llmprune.service.client.aio.client import AsyncClient
    from llmprune.service.client.aio.job import AsyncJobHandle
    from llmprune.service.client.sync.client import Client
    from llmprune.service.client.sync.job import JobHandle

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "AsyncClient",
    "AsyncJobHandle",
    "CalibrationError",
    "CheckpointError",
    "Client",
    "DeviceError",
    "DeviceMemoryError",
    "DiskError",
    "EvaluationError",
    "GateNotMet",
    "HubError",
    "JobFailed",
    "JobHandle",
    "LLMPruneError",
    "ModelError",
    "NotFound",
    "NumericalError",
    "OutputError",
    "PeerError",
    "Plan",
    "Recipe",
    "RecipeError",
    "Report",
    "ReportPage",
    "ServiceBusy",
    "ServiceError",
    "ServiceUnreachable",
    "StateConflict",
    "VerificationError",
    "make_plan",
    "run",
]

_HOMES = {
    "AsyncClient": "llmprune.service.client.aio.client",
    "AsyncJobHandle": "llmprune.service.client.aio.job",
    "Client": "llmprune.service.client.sync.client",
    "JobHandle": "llmprune.service.client.sync.job",
    "Plan": "llmprune.planning.plan_schema",
    "Recipe": "llmprune.recipe.recipe",
    "Report": "llmprune.results.report_schema",
    "ReportPage": "llmprune.results.notebook.report_page",
    "make_plan": "llmprune.planning.plan",
    "run": "llmprune.pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llmprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "llmprune.common.errors")), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
