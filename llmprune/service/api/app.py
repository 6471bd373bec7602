"""The FastAPI application: routes, middleware and the OpenAPI document."""

from __future__ import annotations

import os
from collections.abc import Callable

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from llmprune import __version__
from llmprune.recipe.recipe import Recipe
from llmprune.service.api import error_responses
from llmprune.service.api.access.auth import AuthMiddleware
from llmprune.service.api.access.large_bodies import ProblemsOfLargeBodies
from llmprune.service.api.access.requests_log import RequestsLogMiddleware
from llmprune.service.api.access.server_paths import ServerPaths
from llmprune.service.api.accounts import account, audit, users
from llmprune.service.api.dependencies import Service
from llmprune.service.api.files import archives, outputs
from llmprune.service.api.files.stored_files import StoredFiles
from llmprune.service.api.jobs import follow_ups, live, notifications, recipes, sharing, sweeps
from llmprune.service.api.jobs import jobs as job_routes
from llmprune.service.api.jobs.recipe_queue import RecipeQueue
from llmprune.service.api.library import compare, models, uploads
from llmprune.service.api.monitoring import status
from llmprune.service.api.monitoring.machine_metrics import MachineCollector
from llmprune.service.api.monitoring.metrics import Metrics, MetricsMiddleware
from llmprune.service.database.open_database import open_database
from llmprune.service.environment import hub_variables, inherited
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.uploads.uploads import Uploads
from llmprune.service.monitoring.board import QueueBoard
from llmprune.service.notifications.cipher import TargetCipher
from llmprune.service.notifications.outbox import Outbox
from llmprune.service.oidc.provider import Provider
from llmprune.service.planner.planner import Planner
from llmprune.service.settings import Settings
from llmprune.service.upgrade import bring_up_to_date
from llmprune.service.users.tokens import Tokens
from llmprune.service.web import documentation, routes

DESCRIPTION = """Pruning jobs over HTTP. A submitted recipe becomes a job, which runs as `llmprune run` in a process of
its own. Every file that the run writes can be downloaded. Errors are RFC 9457 problem details."""


def create_app(
    settings: Settings, planner: Planner | None = None, *, wake: Callable[[], None] = lambda: None
) -> FastAPI:
    """Make the service on the data folder of the settings. ``wake`` wakes the supervisor when the job table changes."""
    settings.prepare()
    database = open_database(settings)
    bring_up_to_date(database, settings)
    Uploads(database, settings).remove_broken()
    service = Service(
        settings=settings,
        database=database,
        jobs=(jobs := JobStore(database)),
        tokens=Tokens(database),
        planner=planner or _planner(settings),
        recipe_queue=RecipeQueue(),
        hash_queue=RecipeQueue(),
        wake=wake,
        paths=ServerPaths.of(settings),
        outbox=Outbox(database, TargetCipher(settings.data_dir)),
        queue_board=QueueBoard(settings, jobs, paused=lambda: status.paused(app.state.service)),
        stored_files=StoredFiles.of(settings),
    )
    app = ProblemsOfLargeBodies(
        title="llmprune",
        version=__version__,
        description=DESCRIPTION,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # its scripts come from a CDN
        redoc_url=None,
        max_body_size=settings.body_limit,
        responses={500: error_responses.documented(500)[500]},
    )
    app.state.service = service
    app.state.provider = Provider(settings.oidc) if settings.oidc else None
    app.state.metrics = Metrics(service.jobs)
    app.state.metrics.registry.register(MachineCollector(service))
    _include_routes(app)
    error_responses.install(app)
    _complete_document(app)
    app.add_middleware(AuthMiddleware, settings=settings, tokens=service.tokens)
    app.add_middleware(RequestsLogMiddleware)
    app.add_middleware(MetricsMiddleware, metrics=app.state.metrics)
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
    return app


def _include_routes(app: FastAPI) -> None:
    """Add the routes of the API and the pages."""
    token = Depends(
        HTTPBearer(auto_error=False, description="A token of llmprune token create, or of the Account page.")
    )
    jobs_and_outputs = (job_routes, live, notifications, follow_ups, outputs, archives, sharing)
    library = (compare, uploads, models, sweeps)  # fixed paths of uploads come before ids
    for part in (recipes, *jobs_and_outputs, account, users, audit, status, *library):
        app.include_router(part.router, dependencies=[token])
    app.include_router(status.public_router)
    routes.install(app)
    app.include_router(documentation.router)


def _planner(settings: Settings) -> Planner:
    """Make a planner that may read from the hub what a job without a token may read."""
    lent = settings.lend_hub_token
    environment = inherited(os.environ, lent) | ({} if lent else hub_variables(settings.hub_home))
    return Planner(settings.empty_dir.absolute(), environment=environment)


def _complete_document(app: FastAPI) -> None:
    """Add the schemas of problems and recipes to the OpenAPI document, which no route declares as its model."""
    make = app.openapi

    def openapi() -> dict[str, object]:
        document = make()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.setdefault("Problem", error_responses.Problem.model_json_schema())
        recipe = Recipe.model_json_schema(ref_template="#/components/schemas/Recipe.{model}")
        for name, part in (recipe.pop("$defs") | {None: recipe}).items():
            schemas.setdefault(f"Recipe.{name}" if name else "Recipe", part)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
