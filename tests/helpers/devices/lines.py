"""Lines of code that asked for something of a device."""

from __future__ import annotations

import sys
from pathlib import Path

import llmprune

_LLMPRUNE = str(Path(llmprune.__file__).parent) + "/"
_HERE = str(Path(__file__).parent) + "/"


def current_line() -> str:
    """Return "file:line" of the innermost frame in llmprune; without one, of the innermost frame outside libraries."""
    frame, other = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_LLMPRUNE):
            return f"{name.removeprefix(_LLMPRUNE)}:{frame.f_lineno}"
        if not other and "/site-packages/" not in name and not name.startswith((_HERE, sys.base_prefix)):
            other = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return other
