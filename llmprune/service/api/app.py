"""The application: routes, gate, measures, and the description of it all."""

from __future__ import annotations

import os
from collections.abc import Callable

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from llmprune import __version__
from llmprune.recipe.recipe import Recipe
from llmprune.service.api import error_responses as problems
from llmprune.service.api import jobs, outputs, recipes
from llmprune.service.api import status as machine
from llmprune.service.api.auth import Gate
from llmprune.service.api.dependencies import Service
from llmprune.service.api.metrics import Measure, Metrics
from llmprune.service.api.recipe_turns import Turns
from llmprune.service.api.requests_log import RequestsLog
from llmprune.service.api.server_paths import Paths
from llmprune.service.environment import hub_variables, inherited
from llmprune.service.jobs.database import Database
from llmprune.service.jobs.store import Jobs
from llmprune.service.jobs.tokens import Tokens
from llmprune.service.planner.planner import Planner
from llmprune.service.settings import Settings
from llmprune.service.web import documentation, pages, push

DESCRIPTION = """Pruning jobs over HTTP. A recipe goes in, a job comes out; it runs as `llmprune run` in a process of
its own, and everything that the run leaves can be fetched. Errors are RFC 9457 problems."""


def create_app(
    settings: Settings, planner: Planner | None = None, *, nudge: Callable[[], None] = lambda: None
) -> FastAPI:
    """The service on the data folder of the settings; ``nudge`` is called when there is something to supervise."""
    settings.prepare()
    database = Database(settings.database)
    database.migrate()
    planner = planner or _planner(settings)
    service = Service(settings, database, Jobs(database), Tokens(database), planner, Turns(), nudge, Paths.of(settings))
    app = FastAPI(
        title="llmprune",
        version=__version__,
        description=DESCRIPTION,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # their scripts come from a CDN
        redoc_url=None,
        max_body_size=settings.body_limit,
        responses={500: problems.documented(500)[500]},
    )
    app.state.service = service
    app.state.metrics = Metrics(service.jobs)
    token = Depends(HTTPBearer(auto_error=False, description="A token of llmprune token create."))
    for routes in (recipes.router, jobs.router, outputs.router, machine.router):
        app.include_router(routes, dependencies=[token])
    app.include_router(machine.open_router)
    pages.install(app)
    app.include_router(push.router)
    app.include_router(documentation.router)
    problems.install(app)
    _complete_document(app)
    app.add_middleware(Gate, settings=settings, tokens=service.tokens)
    app.add_middleware(RequestsLog)
    app.add_middleware(Measure, metrics=app.state.metrics)
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
    return app


def _planner(settings: Settings) -> Planner:
    """A planner that reads from the hub what a job without a token may read."""
    lent = settings.lend_hub_token
    environment = inherited(os.environ, lent) | ({} if lent else hub_variables(settings.hub_home))
    return Planner(settings.nowhere.absolute(), environment=environment)


def _complete_document(app: FastAPI) -> None:
    """Add to the OpenAPI document what no route returns or takes as its model: the problem, and the recipe."""
    make = app.openapi

    def openapi() -> dict[str, object]:
        document = make()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.setdefault("Problem", problems.Problem.model_json_schema())
        recipe = Recipe.model_json_schema(ref_template="#/components/schemas/Recipe.{model}")
        for name, part in (recipe.pop("$defs") | {None: recipe}).items():
            schemas.setdefault(f"Recipe.{name}" if name else "Recipe", part)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
