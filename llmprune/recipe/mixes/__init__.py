"""Ready mixes of calibration text: each a YAML file of this folder, whose ``sources`` a recipe could hold as well."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Annotated

from pydantic import AfterValidator, Field

from llmprune.common.errors import did_you_mean
from llmprune.common.schema import Section
from llmprune.recipe.text_source import TextSource
from llmprune.recipe.yaml_reader import read_value

DEFAULT_MIX = "general"


class Mix(Section):
    """A mix file: sources of text by weight, as in ``calibration.sources``."""

    sources: tuple[TextSource, ...] = Field(strict=False, min_length=1, description="Sources, mixed by weight.")


def mix_names() -> list[str]:
    """Return the names of the mixes, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in files(__name__).iterdir() if entry.name[-5:] == ".yaml")


def _existing(name: str) -> str:
    read_mix(name)
    return name


MixName = Annotated[str, AfterValidator(_existing)]


@cache
def read_mix(name: str) -> tuple[TextSource, ...]:
    """Return the sources of a mix. Raises ValueError where there is none of this name."""
    names = mix_names()
    if name not in names:
        near = did_you_mean(name, names)
        raise ValueError(f"there is no mix {name!r}{near}; mixes: {', '.join(names)}")
    text = files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return Mix.model_validate(read_value(text)).sources
