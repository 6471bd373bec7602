"""Templates and static files of the pages."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from llmprune import __version__
from llmprune.common.printing import printable
from llmprune.results.figures.next_tools import NextTools
from llmprune.results.formatting import plural, short_model_name
from llmprune.results.run_folder.products import QUANTIZED_MODEL
from llmprune.results.sentences.next_tools import describe_next_tools
from llmprune.results.templates import template_environment
from llmprune.service.cli.terminal import doing, state_words
from llmprune.service.web.job.about import describe_event

_STATIC = {
    "style.css": (__package__, "static/style.css", "text/css; charset=utf-8"),
    "people.css": (__package__, "static/people.css", "text/css; charset=utf-8"),
    "run.css": (__package__, "static/run.css", "text/css; charset=utf-8"),
    "library.css": (__package__, "static/library.css", "text/css; charset=utf-8"),
    "upload.css": (__package__, "static/upload.css", "text/css; charset=utf-8"),
    "upload.js": (__package__, "static/upload.js", "text/javascript; charset=utf-8"),
    "library.js": (__package__, "static/library.js", "text/javascript; charset=utf-8"),
    "app.js": (__package__, "static/app.js", "text/javascript; charset=utf-8"),
    "new_job.css": (__package__, "static/new_job.css", "text/css; charset=utf-8"),
    "new_job.js": (__package__, "static/new_job.js", "text/javascript; charset=utf-8"),
    "editor.js": (__package__, "built/editor.js", "text/javascript; charset=utf-8"),  # by make editor
    "next.css": (__package__, "static/next.css", "text/css; charset=utf-8"),
    "next.js": (__package__, "static/next.js", "text/javascript; charset=utf-8"),
    "icon.svg": (__package__, "static/icon.svg", "image/svg+xml"),
    "htmx.js": ("js_lib_htmx", "static/htmx/htmx.min.js", "text/javascript; charset=utf-8"),
}


def render(template: str, **values: Any) -> str:
    """Return a rendered template."""
    return _environment().get_template(f"{template}.html.j2").render(**values)


@cache
def static_file(name: str) -> tuple[bytes, str] | None:
    """Return the contents and the media type of a static file; None where there is no such file, or it is not built."""
    if name not in _STATIC:
        return None
    package, path, kind = _STATIC[name]
    file = files(package).joinpath(path)
    return (file.read_bytes(), kind) if file.is_file() else None


def static_address(name: str) -> str:
    """Return an address that changes with the file's contents, such as ``/static/style.css?v=1f3a…``."""
    found = static_file(name)
    assert found is not None, f"{name} is a static file"
    return f"/static/{name}?v={hashlib.sha256(found[0]).hexdigest()[:12]}"


def ago(moment: float | None) -> str:
    """Format the time since a moment roughly, such as ``3 minutes ago``."""
    if moment is None:
        return "–"
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            return f"{plural(int(seconds // size), unit)} ago"
    return "just now"


def clock(moment: float | None) -> str:
    """Format a moment as ``2026-01-31 14:05`` in the service's time zone."""
    return "–" if moment is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def model_name(model: str) -> str:
    """Return a hub id, or the last part of a path or URL, such as ``SmolLM2-135M-Instruct.Q4_1``."""
    return short_model_name(model) if "://" in model or model[:1] == "/" else model


def browser_name(stated: str) -> str:
    """Return what a User-Agent header says for people, such as ``Firefox on Linux``."""
    names = {"Edg/": "Edge", "Firefox/": "Firefox", "Chrome/": "Chrome", "Safari/": "Safari"}
    systems = {"Windows": "Windows", "Android": "Android", "iPhone": "iPhone", "iPad": "iPad", "Mac OS": "macOS"}
    name = next((name for part, name in names.items() if part in stated), None)
    system = next((name for part, name in (systems | {"Linux": "Linux"}).items() if part in stated), None)
    if name is None:
        return printable(stated[:60]) or "unknown browser"
    return f"{name} on {system}" if system else name


def moment(seconds: float) -> str:
    """Format a moment as ``2026-01-31T14:05:00Z``."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def planned_tools(tools: Mapping[str, Any]) -> list[str]:
    """Return clauses on the tools that a planned shape allows. ``tools``: as the planner's process answers."""
    return describe_next_tools(NextTools.model_validate(tools))


@cache
def _environment() -> Environment:
    environment = template_environment("llmprune.service.web", "templates")
    environment.filters.update(
        ago=ago,
        browser_name=browser_name,
        clock=clock,
        model_name=model_name,
        moment=moment,
        described_event=describe_event,
        planned_tools=planned_tools,
        printable=printable,
        state_words=state_words,
    )
    environment.tests["in_model"] = lambda name: name.startswith("model/")
    environment.tests["in_quantized"] = lambda name: name.startswith(f"{QUANTIZED_MODEL}/")
    environment.globals.update(
        static=static_address,
        has_editor=lambda: static_file("editor.js") is not None,
        version=__version__,
        doing=lambda job: doing(job.model_dump()),
    )
    return environment
