"""Ready mixes of calibration text, and the default of a recipe that names no text."""

from __future__ import annotations

import re

import pytest

from llmprune.recipe.mixes import mix_names, read_mix
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.text_source import is_local

MODEL = "model: {id: org/model}\ndepth: {remove: 1}\n"


@pytest.mark.parametrize("name", mix_names())
def test_every_mix_is_pinned_and_named(name: str) -> None:
    """Every source of a mix is a hub data set that is streamed, at a commit, with a name of its own and a licence."""
    sources = read_mix(name)
    assert len({source.name for source in sources}) == len(sources)
    for source in sources:
        assert not is_local(source.dataset)
        assert source.split.isidentifier()
        assert re.fullmatch(r"[0-9a-f]{40}", source.revision or "")
        assert source.licence


@pytest.mark.parametrize("section", ["", "calibration: {}", "calibration: {mix: general}"])
def test_the_general_mix_is_the_default(section: str) -> None:
    """A recipe that names no text is calibrated on the general mix, of which 16 samples give each source a window."""
    recipe = Recipe.parse(MODEL + section)
    assert recipe.calibration.text_sources() == read_mix("general")
    weights = [source.weight for source in recipe.calibration.text_sources()]
    assert sum(weights) / min(weights) <= 16


def test_a_copied_mix_is_a_valid_list_of_sources() -> None:
    """The sources of a mix can be copied into a recipe, and stay the same."""
    copied = [source.model_dump(exclude_none=True) for source in read_mix("general")]
    recipe = Recipe.model_validate({"model": {"id": "org/model"}, "calibration": {"sources": copied}})
    assert recipe.calibration.text_sources() == read_mix("general")
