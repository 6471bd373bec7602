"""Names of models and texts for a model card, without the folders of the machine that ran."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from llmprune.recipe.text_source import FILE_BUILDERS
from llmprune.results.figures.recovery import RecoveryFigures
from llmprune.results.figures.search import SearchFigures

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DRIVE = re.compile(r"[A-Za-z]:")
_FILES = {*FILE_BUILDERS, ".gguf", ".safetensors"}
_PART = re.compile(
    r"(?P<place>.*?)(?P<split> \([^()]*\))?", re.DOTALL
)  # part of a description such as "wiki.txt (train)"


def public_name(place: str, *, local: bool = False) -> str:
    """Return the last part of a path; a hub id, package or address unchanged.

    ``local``: treat ``place`` as a path even if it looks like a hub id.
    """
    path = place.strip().strip("'\"")
    if not _is_path(path, local=local):
        return place
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def public_sources(description: str) -> str:
    """Return a description of texts, ``PLACE (SPLIT), PLACE (SPLIT)``, with each place under its public name."""
    matches = (_PART.fullmatch(part) for part in re.split(r"(?<=\)), ", description))
    return ", ".join(public_name(found["place"]) + (found["split"] or "") for found in matches if found)


def public_search(found: SearchFigures) -> SearchFigures:
    """Return the figures of a search with the public names of its sources, numbered where two agree."""
    names = _numbered(found.sources)
    tried = tuple(
        one.model_copy(
            update={
                "divergence": {names[source]: value for source, value in one.divergence.items()},
                "broken": one.broken and names[one.broken],
            }
        )
        for one in found.tried
    )
    return found.model_copy(update={"tried": tried, "sources": tuple(names.values())})


def public_recovery(found: RecoveryFigures) -> RecoveryFigures:
    """Return the figures of a training with the public names of its sources, numbered where two agree."""
    names = _numbered(found.before.divergence)

    def renamed(values: dict[str, float]) -> dict[str, float]:
        return {names[source]: value for source, value in values.items()}

    checks = tuple(
        check.model_copy(update={"divergence": renamed(check.divergence), "perplexity": renamed(check.perplexity)})
        for check in found.checks
    )
    return found.model_copy(update={"checks": checks, "dense_perplexity": renamed(found.dense_perplexity)})


def _numbered(sources: Iterable[str]) -> dict[str, str]:
    """Return the public name of each source, with a number where an earlier one has the same."""
    names: dict[str, str] = {}
    for source in sources:
        name = public_sources(source)
        names[source] = name if name not in names.values() else f"{name} ({len(names) + 1})"
    return names


def _is_path(place: str, *, local: bool) -> bool:
    if place.lower().startswith("file:"):
        return True
    if "://" in place:
        return False
    if local or place.startswith(("/", ".", "~")) or "\\" in place or _DRIVE.match(place):
        return True
    return "/" in place and (not _HUB_ID.fullmatch(place) or PurePosixPath(place).suffix in _FILES)
