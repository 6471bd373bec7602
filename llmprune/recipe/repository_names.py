"""Names of models and data sets on the hub, and the addresses of their pages, which people paste in their place."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

_MOST_BYTES, _MOST_OF_PART = 4095, 255  # of a path on Linux
_SCHEME = re.compile(r"(?:https?|hf):/+", re.IGNORECASE)
# The parts of an address of the hub: the repository, and the revision that a page of it shows.
_PAGE = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?P<kind>datasets/|models/)?"
    r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/(?P<revision>[\w.-]+))?(?:[/?#].*)?",
    re.IGNORECASE,
)


def _short_enough(name: str) -> str:
    """Return a name unchanged. Raises ValueError where no file system has a path like that."""
    if len(name.encode("utf-8", "replace")) > _MOST_BYTES or any(
        len(part.encode("utf-8", "replace")) > _MOST_OF_PART for part in name.split("/")
    ):
        raise ValueError(f"a path has at most {_MOST_BYTES} bytes, and {_MOST_OF_PART} between two slashes; shorten it")
    return name


def _no_address(name: str) -> str:
    """Return a name unchanged. Raises ValueError for an address, with the name to write instead."""
    if not _SCHEME.match(name):
        return name
    page = _PAGE.fullmatch(name)
    if page is None:
        raise ValueError("nothing is read from an address; download it and name its folder or file, or name a hub id")
    revision = page["revision"]
    more = f", with the revision {revision}" if revision not in (None, "main") else ""
    raise ValueError(f"an address is no name; write the hub id {page['id']}{more}")


RepositoryName = Annotated[str, Field(min_length=1), AfterValidator(_short_enough), AfterValidator(_no_address)]
