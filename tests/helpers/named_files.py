"""Indices and JSON files of a model whose names are changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

WEIGHTS = "model.safetensors"


def index(shard: str, folder: Path) -> bytes:
    """An index that maps every tensor of a folder's weights to one file."""
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        names = list(weights.keys())
    return json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}).encode()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place; one that is not there begins empty."""
    data = json.loads(path.read_text()) if path.is_file() else {}
    change(data)
    path.write_text(json.dumps(data))


ELSEWHERE = [
    "{private}",
    "../../private/x.safetensors",
    "a/../../../private/x.safetensors",
    "~/x",
    "file:x",
    "..\\x",
    "",
]
