"""Schema of ``report.json``: every part of the report with its fields, types and meanings.

The meanings are the comments beside the fields in the source, so that there is one place to change them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from pydantic import BaseModel

from llmprune import Report
from llmprune.recipe.validation_messages import models_in


def report_schema() -> str:
    """Markdown with one table for each part of the report, the whole report first."""
    return "\n\n".join(_part(model) for model in dict.fromkeys(_models(Report)))


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A part and all parts inside it, each before those inside it."""
    yield model
    for field in model.model_fields.values():
        for inner in models_in(field.annotation):
            yield from _models(inner)


def _part(model: type[BaseModel]) -> str:
    """Heading, docstring and table of one part."""
    rows = [f"| `{name}` | {_cell(kind)} | {meaning} |" for name, kind, meaning in _fields(model)]
    table = "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])
    return f"## {model.__name__}\n\n{inspect.getdoc(model)}\n\n{table}"


def _cell(kind: str) -> str:
    return "`" + kind.replace("|", "\\|") + "`"


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    """Name, type and meaning of each field, inherited ones included, in the order of the source."""
    for base in reversed(model.__mro__):
        if not (issubclass(base, BaseModel) and base is not BaseModel):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        lines = source.splitlines()
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.target.id != "model_config"
            ):
                yield node.target.id, ast.unparse(node.annotation), _comment(lines, node)


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    """Comment at the end of a field's last line; without one, the comment lines above the field."""
    assert node.end_lineno is not None
    _, mark, said = lines[node.end_lineno - 1][node.end_col_offset or 0 :].partition("#")
    if mark:
        return said.strip().replace("|", "\\|")
    above: list[str] = []
    index = node.lineno - 2
    while lines[index].strip().startswith("#"):
        above.insert(0, lines[index].strip().lstrip("# "))
        index -= 1
    return " ".join(above).replace("|", "\\|")
