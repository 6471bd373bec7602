"""Developer pages: the table of allowed imports, the map of the tree, and sources that serve as examples."""

from __future__ import annotations

import ast
import inspect
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from llmprune.recipe.recipe import Recipe
from llmprune.recipe.validation_messages import models_in

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llmprune"
RULES = ROOT / "tests" / "test_import_rules.py"


def import_table() -> str:
    """Markdown table of the rooms and what each may import, foundations first."""
    rooms = _rooms()
    rows = [
        f"| `{room}` | {', '.join(f'`{other}`' for other in sorted(rooms[room])) or 'nothing'} |"
        for room in TopologicalSorter(rooms).static_order()
    ]
    return "\n".join(["| room | may import |", "|---|---|", *rows])


def _rooms() -> dict[str, set[str]]:
    """The table ``ROOMS`` of the import test, read from its source."""
    for node in ast.parse(RULES.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ROOMS" and node.value:
            table: dict[str, set[str]] = eval(compile(ast.Expression(node.value), str(RULES), "eval"))
            return table
    raise ValueError(f"{RULES} has no table ROOMS")


def tree() -> str:
    """Markdown list of every module with the first line of its docstring, by folder."""
    parts = []
    folders = sorted({path.parent for path in PACKAGE.rglob("*.py")})
    for folder in folders:
        lines = [line for path in sorted(folder.glob("*.py")) if (line := _line(path))]
        if lines:
            parts.append(f"### `{folder.relative_to(ROOT)}/`\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _line(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not doc:
        return ""
    first = " ".join(doc.split("\n\n")[0].split())
    return f"- `{path.name}`: {first}"


def source_of_kind(section: str, kind: str) -> str:
    """Source of the file that holds a criterion or method, by recipe section and ``kind``."""
    for model in _kinds(Recipe, section):
        if get_args(model.model_fields["kind"].annotation) == (kind,):
            module = sys.modules[model.__module__]
            path = Path(str(module.__file__)).relative_to(ROOT)
            return f'```python title="{path}"\n{inspect.getsource(module).rstrip()}\n```'
    raise ValueError(f"the section {section} has no kind {kind!r}")


def _kinds(recipe: type[BaseModel], section: str) -> list[type[BaseModel]]:
    """Models inside a section that have a ``kind``."""
    found: list[type[BaseModel]] = []
    pending: list[Any] = [recipe.model_fields[section].annotation]
    while pending:
        for model in models_in(pending.pop()):
            if "kind" in model.model_fields:
                found.append(model)
            pending += [field.annotation for field in model.model_fields.values()]
    return found
