"""Begin of text: the ids that a tokenizer puts in front of a text, in windows of every kind."""

from __future__ import annotations

import pytest
from helpers.tiny import tiny_tokenizer
from helpers.tokenizers import SHAPES, shaped_tokenizer
from tokenizers import processors

from llmprune.data.begin_of_text import begin_token, begin_tokens


@pytest.mark.parametrize("name", SHAPES)
def test_begin_is_what_the_tokenizer_adds(name: str) -> None:
    """The begin-of-text ids are those of the post-processor; a bos token that is only defined is none."""
    tokenizer = shaped_tokenizer(name)
    expected = tuple(tokenizer.convert_tokens_to_ids(list(SHAPES[name].begins)))
    assert begin_tokens(tokenizer) == expected
    assert begin_token(tokenizer) == (expected[0] if expected else None)


def test_an_end_token_is_no_begin_of_text() -> None:
    """An id that the tokenizer appends to a text does not begin one."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", pair=None, special_tokens=[("<|end|>", 256)]
    )
    assert tokenizer("a")["input_ids"][-1] == 256
    assert begin_token(tokenizer) is None
