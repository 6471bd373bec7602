"""mkdocs hooks: expand generated parts of pages, and move inline scripts into files.

A page has a line ``<!-- generated: NAME -->`` where the text of ``PARTS[NAME]`` belongs. The service's
Content-Security-Policy forbids inline scripts, so that each becomes a file of the site.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]  # this package, and llmprune

from generate import (  # noqa: E402
    architecture,
    commands,
    environment,
    http_api,
    interoperation,
    peer_results,
    recipe,
    reliability,
    report_schema,
    results,
)

PARTS: dict[str, Callable[[], str]] = {
    "changelog": lambda: (architecture.ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    "quickstart": results.quickstart,
    "recipe": recipe.recipe_reference,
    "commands": commands.command_reference,
    "report schema": report_schema.report_schema,
    "http api": http_api.http_api,
    "exit codes": environment.exit_codes,
    "fixed limits": environment.fixed_limits,
    "machine": results.machine,
    "quality": results.quality,
    "peers": peer_results.peers,
    "calibrations": results.calibrations,
    "recovery": results.recovery,
    "gemma": results.gemma,
    "shapes": results.shapes,
    "vocabularies": results.vocabularies,
    "criteria": results.criteria,
    "half width": results.half_width,
    "forward passes": results.forward_passes,
    "memory": results.memory,
    "processes memory": results.processes_memory,
    "start up": results.start_up,
    "intervals": reliability.intervals,
    "service": reliability.service,
    "nodes": reliability.nodes,
    "faults": reliability.faults,
    "model support": results.model_support,
    "interoperation": interoperation.interoperation,
    "import table": architecture.import_table,
    "tree": architecture.tree,
    "depth criterion": lambda: architecture.source_of_kind("depth", "block_influence"),
    "width criterion": lambda: architecture.source_of_kind("width", "wanda"),
    "sparsity method": lambda: architecture.source_of_kind("sparsity", "magnitude"),
}
MARK = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)
_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every mark of a page by its generated text."""
    return MARK.sub(lambda mark: PARTS[mark[1]](), markdown)


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Move the page's inline scripts into files of the site."""
    folder = Path(config["site_dir"]) / "assets" / "inline"
    start = "../" * page.url.count("/")

    def moved(script: re.Match[str]) -> str:
        name = hashlib.sha256(script[1].encode()).hexdigest()[:12] + ".js"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(script[1], encoding="utf-8")
        return f'<script src="{start}assets/inline/{name}"></script>'

    return _INLINE_SCRIPT.sub(moved, output)
