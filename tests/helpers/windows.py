"""Token windows under the tiny tokenizer, and files of rows to read them from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from helpers.tiny import tiny_tokenizer
from llmprune.data.windows import load_windows
from llmprune.recipe.calibration import Calibration


def load(chat: bool = True, **settings: Any) -> torch.Tensor:
    """Return windows under the tiny tokenizer, 4 × 16 unless the settings differ."""
    return load_windows(Calibration(**settings), tiny_tokenizer(chat), default_shape=(4, 16)).windows_NL


def decoded(windows_NL: torch.Tensor) -> list[str]:
    """Return the text of each window."""
    return tiny_tokenizer().batch_decode(windows_NL)


def write_rows(path: Path, rows: list[Any], column: str = "text") -> str:
    """Write JSON lines with one column; return the path of the file."""
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return str(path)
