"""The scope that each route needs. A test shows that no route is missing; a route that is may only be read."""

from __future__ import annotations

from functools import cache
from re import Pattern

from starlette.routing import compile_path

from llmprune.service.users.tokens import SCOPE_MEANINGS, Caller, Scope

PUBLIC = ("/v1/health", "/v1/ready", "/login", "/login/oidc", "/login/oidc/callback")  # for callers that are unknown
_SAFE = ("GET", "HEAD", "OPTIONS")

# None: every caller, whatever the scopes.
ROUTES: dict[Scope | None, tuple[str, ...]] = {
    None: (
        *(f"GET {path}" for path in PUBLIC),
        "POST /login",
        "POST /logout",
        "GET /static/{name}",
        "GET /docs",
        "GET /docs/",
        "GET /docs/{path:path}",
        "GET /v1/openapi.json",
    ),
    "read": (
        "GET /",
        "GET /now",
        "GET /compare",
        "GET /jobs/{job}",
        "GET /jobs/{job}/live",
        "GET /jobs/{job}/log",
        "GET /jobs/{job}/log/more",
        "GET /jobs/{job}/log.txt",
        "GET /jobs/{job}/usage",
        "GET /notifications",
        "GET /jobs/{job}/search",
        "GET /v1/jobs",
        "GET /v1/jobs/{job}",
        "GET /v1/jobs/{job}/events",
        "GET /v1/jobs/{job}/log",
        "GET /v1/jobs/{job}/notifications",
        "GET /v1/jobs/{job}/progress",
        "GET /v1/jobs/{job}/usage",
        "GET /v1/notifications",
        "GET /v1/jobs/{job}/archive",
        "GET /v1/jobs/{job}/artifacts",
        "GET /v1/jobs/{job}/checksums",
        "GET /v1/jobs/{job}/artifacts/{name:path}",
        "GET /v1/jobs/{job}/report",
        "GET /v1/jobs/{job}/report.html",
        "GET /v1/jobs/{job}/follow-ups",
        "GET /v1/compare",
        "GET /v1/compare.csv",
        "GET /models",
        "GET /models/choices",
        "GET /sweeps/{sweep}",
        "GET /sweeps/{sweep}/now",
        "GET /v1/models",
        "GET /v1/models/{job}",
        "GET /v1/sweeps",
        "GET /v1/sweeps/{sweep}",
        # Labels need the scope manage, the stage also approve: see may_label.
        "POST /models/label",
        "POST /v1/models/label",
        "POST /jobs/{job}/labels",
        "PATCH /v1/models/{job}",
        "GET /v1/queue",
        "GET /v1/metrics",
        "POST /v1/recipes/validate",
        "POST /v1/recipes/plan",
    ),
    "submit": (
        "GET /submit",
        "POST /submit",
        "POST /submit/compose",
        "POST /submit/check",
        "POST /submit/plan",
        "POST /submit/times",
        "GET /submit/models",
        "GET /submit/frontier",
        "GET /submit/schema",
        "POST /submit/draft",
        "POST /submit/draft/discard",
        "POST /v1/jobs",
        "POST /jobs/{job}/follow-ups",
        "POST /v1/jobs/{job}/follow-ups",
        "GET /sweep",
        "POST /sweep",
        "POST /sweep/new",
        "POST /submit/sweep",
        "POST /v1/sweeps",
        "GET /models/upload",
        "POST /models/upload",
        "POST /v1/models/uploads",
        "GET /v1/models/uploads/{upload}",
        "PUT /v1/models/uploads/{upload}/files/{name:path}",
        "POST /v1/models/uploads/{upload}/finish",
        "DELETE /v1/models/uploads/{upload}",
    ),
    "manage": (
        "POST /models/delete",
        "POST /v1/models/delete",
        "POST /sweeps/{sweep}/cancel",
        "POST /v1/sweeps/{sweep}/cancel",
        *(
            f"{method} {prefix}/jobs/{{job}}{what}"
            for prefix in ("", "/v1")
            for method, what in (
                ("POST", "/cancel"),
                ("POST", "/retry"),
                ("POST", "/reevaluate"),
                ("POST", "/push"),
                ("POST", "/share"),
                ("POST", "/unshare"),
                ("POST", "/delete") if not prefix else ("DELETE", ""),
                ("PUT" if prefix else "POST", "/notifications"),
            )
        ),
        "POST /notifications",
        "POST /notifications/test",
        "PUT /v1/notifications",
        "POST /v1/notifications/test",
    ),
    "approve": (),
    "account": (
        "GET /account",
        "POST /account/tokens",
        "POST /account/tokens/{token}/revoke",
        "POST /account/sessions/end",
        "GET /v1/account",
        "GET /v1/account/tokens",
        "POST /v1/account/tokens",
        "DELETE /v1/account/tokens/{token}",
        "GET /v1/account/sessions",
        "DELETE /v1/account/sessions",
    ),
    "admin": (
        "GET /users",
        "POST /users",
        "GET /users/{user}",
        "POST /users/{user}",
        "POST /users/{user}/quotas",
        "POST /users/{user}/transfer",
        "GET /users/{user}/delete",
        "POST /users/{user}/delete",
        "POST /users/{user}/tokens",
        "POST /users/{user}/tokens/{token}/revoke",
        "POST /users/{user}/sign-out",
        "GET /audit",
        "GET /v1/users",
        "POST /v1/users",
        "GET /v1/users/{user}",
        "PATCH /v1/users/{user}",
        "DELETE /v1/users/{user}",
        "PUT /v1/users/{user}/quotas",
        "POST /v1/users/{user}/transfer",
        "DELETE /v1/users/{user}/sessions",
        "GET /v1/users/{user}/tokens",
        "POST /v1/users/{user}/tokens",
        "DELETE /v1/users/{user}/tokens/{token}",
        "GET /v1/audit",
    ),
}


def scope_of(method: str, path: str) -> Scope | None:
    """Return the scope that a request needs. One without an entry may read, and only admins may do more."""
    kind = "GET" if method == "HEAD" else method
    for pattern, scope in _patterns().get(kind, ()):
        if pattern.match(path):
            return scope
    return "read" if method in _SAFE else "admin"


def refusal_of(caller: Caller, method: str, path: str) -> str | None:  # noqa: PLR0917 - a request's parts
    """Return why a caller may not send a request; None where it may."""
    scope = scope_of(method, path)
    if scope is None or caller.may(scope):
        return None
    what = SCOPE_MEANINGS[scope]
    if Caller(caller.name, caller.role).may(scope):
        return f"this token may not {what}: it lacks the scope {scope!r}; make one with it on the Account page"
    return f"the role {caller.role} may not {what}; ask an admin for another role, or for a token with more scopes"


@cache
def _patterns() -> dict[str, list[tuple[Pattern[str], Scope | None]]]:
    found: dict[str, list[tuple[Pattern[str], Scope | None]]] = {}
    for scope, routes in ROUTES.items():
        for method, path in (route.split(" ") for route in routes):
            found.setdefault(method, []).append((compile_path(path)[0], scope))
    return found
