"""HTTP API reference: every operation of the service, from its OpenAPI document."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def openapi_document() -> Json:
    """The OpenAPI document that a service answers at ``/v1/openapi.json``."""
    from llmprune.service.api.app import create_app
    from llmprune.service.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        return create_app(Settings(data_dir=Path(folder))).openapi()


def http_api() -> str:
    """Markdown of every operation with its parameters, body and answers, and of every schema that they name."""
    document = openapi_document()
    operations = [
        _operation(method, path, operation=operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = document["components"]["schemas"]
    named = [name for name in schemas if not name.startswith("Recipe")]
    tables = [_schema(name, schemas[name]) for name in named]
    return "\n\n".join([*operations, "## Schemas", *tables])


def _operation(method: str, path: str, *, operation: Json) -> str:
    parts = [f"## {method.upper()} `{path}`", operation.get("description", "")]
    parameters = operation.get("parameters", [])
    if parameters:
        rows = [
            f"| `{one['name']}` | {one['in']} | {_kind(one['schema'])} | {_plain(one.get('description', ''))} |"
            for one in parameters
        ]
        parts.append("\n".join(["| parameter | in | type | meaning |", "|---|---|---|---|", *rows]))
    body = operation.get("requestBody")
    if body:
        kinds = ", ".join(f"`{kind}`" for kind in body["content"])
        parts.append(f"Body: {kinds}. {body.get('description', '')}".strip())
    answers = [f"{code} {_answer(answer)}" for code, answer in operation["responses"].items()]
    parts.append("Answers: " + "; ".join(answers) + ".")
    return "\n\n".join(part for part in parts if part)


def _answer(answer: Json) -> str:
    """Description of an answer and the schema of its body."""
    for content in answer.get("content", {}).values():
        kind = _kind(content.get("schema", {}))
        if "#" in kind:
            return f"{_plain(answer['description'])} ({kind})"
    return _plain(answer["description"])


def _schema(name: str, schema: Json) -> str:
    rows = [
        f"| `{key}` | {_kind(value)} | {_plain(value.get('description', ''))} |"
        for key, value in schema.get("properties", {}).items()
    ]
    table = "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])
    return "\n\n".join(part for part in (f"### {name}", _plain(schema.get("description", "")), table) if part)


def _kind(schema: Json) -> str:
    """Type of a schema in words, with a link to a named one."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})" if not name.startswith("Recipe") else "[recipe](recipe.md)"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(one) for one in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    kind = str(schema.get("type", "any"))
    return {"null": "none", "object": "mapping"}.get(kind, kind)


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
