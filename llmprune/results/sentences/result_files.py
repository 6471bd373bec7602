"""Phrases about files of the result: copied ones, and quantized weights."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.common.schema import format_size
from llmprune.results.figures.result_files import BaseFiles, RequantizedFigures
from llmprune.results.formatting import number, plural

_MOST_FILES = 30  # listed in one sentence


def describe_requantized(found: RequantizedFigures) -> str:
    """Return a phrase with format, size and error of the result in its base's quantized format."""
    weights = plural(found.weights, "weight matrix", many="weight matrices")
    return (
        f"{found.format} in {weights}, {format_size(found.bytes)}; KL divergence from the unquantized result "
        f"{number(found.divergence)} nats per token on calibration text"
    )


def describe_carried(files: BaseFiles) -> str:
    """Return the names of the base model's files that are copied."""
    return _listed(files.carried)


def describe_left(files: BaseFiles) -> str:
    """Return the names of the base model's files that are not copied, each with the reason."""
    return _listed([f"{name} ({reason})" for name, reason in files.left.items()])


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_FILES
    return ", ".join(texts[:_MOST_FILES]) + (f" and {more:,} more" if more > 0 else "")
