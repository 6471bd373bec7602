"""Begin of text in lm-eval's prompts and in free generation: as the tokenizer begins a text."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.lm_eval_tasks import tiny_llama
from helpers.shaped_tokenizers import SHAPES, shaped_tokenizer
from helpers.whole_models import lm_of

from llmprune.data.begin_of_text import begin_tokens
from llmprune.evaluation.lm_eval.worker import begin_texts_as_tokenizer


@pytest.mark.parametrize("name", SHAPES)
def test_prompts_of_a_model_in_memory(name: str) -> None:
    """A prompt begins with the begin-of-text ids once, in a request for likelihoods and in one for an answer."""
    tokenizer = shaped_tokenizer(name)
    begin, lm = list(begin_tokens(tokenizer)), lm_of(tiny_llama(layers=1), tokenizer, 2)
    plain = tokenizer("The key", add_special_tokens=False)["input_ids"]
    assert lm.tok_encode("The key") == begin + plain
    assert lm._encode_pair("The key", " is")[0] == begin + plain
    assert lm.tok_batch_encode(["The key"])[0].tolist() == [begin + plain]


@pytest.mark.parametrize("name", ["gemma3", "qwen"])
def test_prompts_of_an_endpoint(name: str, tmp_path: Path) -> None:
    """An endpoint's client, which never adds the token by itself, adds it where the tokenizer does."""
    from lm_eval.api.registry import get_model

    tokenizer = shaped_tokenizer(name)
    tokenizer.save_pretrained(tmp_path)
    address = {"base_url": "http://127.0.0.1:1/v1/completions", "tokenizer_backend": "huggingface"}
    lm = get_model("local-completions").create_from_arg_obj({"model": "m", "tokenizer": str(tmp_path), **address})
    plain = tokenizer("The key", add_special_tokens=False)["input_ids"]
    assert lm.tok_encode("The key") == plain
    begin_texts_as_tokenizer(lm)
    assert lm.tok_encode("The key") == [*begin_tokens(tokenizer), *plain]
    assert lm.tok_encode(["The key"], add_special_tokens=lm.add_bos_token) == [[*begin_tokens(tokenizer), *plain]]
