"""Table of next tools over families, from the file that ``eval/interop/interop.py`` recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from generate.results import as_table

RECORDED = Path(__file__).parents[2] / "eval" / "interop" / "results" / "interop.json"


def interoperation() -> str:
    """Whether each tool works, dense and pruned, by family; below it each failure with the tool's reason."""
    found: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))["figures"]
    tools = list(next(iter(found.values()))["dense"])
    rows = [[tool, *(_cell(both, tool) for both in found.values())] for tool in tools]
    reasons = {
        f"- {tool}, {family}, {kind}: {outcome['told']}"
        for family, both in found.items()
        for kind, outcomes in both.items()
        for tool, outcome in outcomes.items()
        if outcome["state"] in ("fails", "not checked")
    }
    table = as_table(["tool, dense / pruned", *found], rows)
    figures = [
        [family, both["dense"][tool]["told"], both["pruned"][tool]["told"]]
        for family, both in found.items()
        for tool in tools
        if tool.startswith("llama.cpp") and both["dense"][tool]["state"] == both["pruned"][tool]["state"] == "works"
    ]
    parts = [table, "Reasons:\n\n" + "\n".join(sorted(reasons)) if reasons else ""]
    parts += ["In llama.cpp:\n\n" + as_table(["family", "dense", "pruned"], figures) if figures else ""]
    return "\n\n".join(part for part in parts if part)


def _cell(both: dict[str, Any], tool: str) -> str:
    """Return the states of the dense and the pruned model; one word where they are the same."""
    dense, pruned = both["dense"][tool]["state"], both["pruned"][tool]["state"]
    return str(dense) if dense == pruned else f"{dense} / **{pruned}**"
