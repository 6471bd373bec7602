"""Results kept by config: the same values are the same key, wherever they were read, and no error is kept."""

from __future__ import annotations

import itertools

import pytest

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.kept_results import KeptResults, config_key
from llmprune.testing import tiny_model


def test_a_config_is_known_by_its_class_and_values() -> None:
    """Folder and name do not matter; any value and the class do."""
    config = tiny_model("llama").config
    again = tiny_model("llama").config
    again._name_or_path = "elsewhere"
    assert config_key(config) == config_key(again)
    assert discover(config) is discover(again)
    again.intermediate_size -= 8
    assert discover(again).groups != discover(config).groups
    assert config_key(config) != config_key(tiny_model("mistral").config)


def test_the_oldest_is_forgotten_and_no_error_is_kept() -> None:
    """The number of results has a limit, and what failed is tried again."""
    kept, numbers = KeptResults[int](most=2), itertools.count()
    with pytest.raises(ZeroDivisionError):
        kept.get("a", lambda: 1 // 0)
    assert [kept.get(key, lambda: next(numbers)) for key in "abcca"] == [0, 1, 2, 2, 3]
    assert kept.get("c", lambda: 9) == 2
