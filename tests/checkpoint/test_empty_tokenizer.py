"""Folders without the files of a tokenizer, for which transformers makes one of special tokens alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from llmprune.checkpoint.loading import is_empty, load_tokenizer
from llmprune.common.errors import ModelError
from llmprune.evaluation.next_tools.base import NotChecked, Subject
from llmprune.recipe.model import ModelSource


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3", "gpt2", "gpt_neox", "cohere", "llama"])
def test_missing_tokenizer_is_named(tmp_path: Path, model_type: str) -> None:
    """The sentence says what to put where, whether transformers refuses the folder or makes an empty tokenizer."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no tokenizer; put its files \(tokenizer.json, …\) beside config.json"):
        load_tokenizer(ModelSource(id=str(tmp_path)))
    with pytest.raises(NotChecked, match="has no tokenizer"):
        Subject(tmp_path, tmp_path).tokenizer()


def test_small_tokenizer_is_not_empty(workspace: Path) -> None:
    """The tests' tokenizer of a few words is one."""
    assert not is_empty(AutoTokenizer.from_pretrained(workspace / "base"))
