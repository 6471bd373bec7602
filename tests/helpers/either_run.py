"""Replacement of ``llmprune``: the fake run for a recipe that begins with ``# fake``, otherwise the real program."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run one of the two with this process's arguments."""
    named = Path(sys.argv[2])  # a recipe, or the run folder beside one
    recipe = named.parent / "recipe.yaml" if named.is_dir() else named
    if recipe.read_text(encoding="utf-8").startswith("# fake "):
        runpy.run_path(str(Path(__file__).with_name("fake_run.py")), run_name="__main__")
    else:
        runpy.run_module("llmprune", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
