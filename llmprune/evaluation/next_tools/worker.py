"""Process of one check: python -m llmprune.evaluation.next_tools.worker NAME FOLDER SCRATCH [REPORT]

Its last line on standard output is JSON with the state and a sentence.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llmprune.evaluation.next_tools.base import NotChecked, Subject
from llmprune.evaluation.next_tools.registry import CHECKS


def main(name: str, folder: str, *others: str) -> None:
    """Make one check and print its outcome."""
    subject = Subject(Path(folder), *map(Path, others))
    try:
        state, told = "works", CHECKS[name].work(subject)
    except NotChecked as reason:
        state, told = "not checked", str(reason)
    except Exception as error:  # any error of a tool is a row of the table
        kind = type(error).__name__
        text = " ".join(str(error).split())
        state, told = "fails", text if kind in ("ToolFailure", "ModelError") else f"{kind}: {text}"
    print(json.dumps({"state": state, "told": told}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
