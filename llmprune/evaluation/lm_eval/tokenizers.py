"""Comparison of tokenizers: scores per sample are comparable only if both models see the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.common.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# letters, capitals, digits, code, accents, other scripts, repeated spaces
_PROBE = "The quick brown Fox, 12345.67 + x_9;\n\tdef f(a):  return a\n\nnaïve Straße – 日本語 مرحبا 🙂   end "


def require_same_tokenizer(
    base: str, one: PreTrainedTokenizerBase | None, *, model: str, other: PreTrainedTokenizerBase | None
) -> None:
    """Raise EvaluationError unless both have the same vocabulary, special tokens and tokenization."""
    assert one is not None, "both are loaded"
    assert other is not None, "both are loaded"
    difference = _difference(one, other)
    if difference:
        raise EvaluationError(
            f"the tokenizers of {base} and {model} differ: {difference}; scores of models with different tokens "
            "are not comparable sample by sample: evaluate each alone, or give both the same tokenizer"
        )


def _difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    words, others = one.get_vocab(), other.get_vocab()
    if words != others:
        if len(words) != len(others):
            return f"{len(words):,} tokens and {len(others):,}"
        token = next(word for word, index in words.items() if others.get(word) != index)
        return f"the token {token!r} is {words[token]} in one and {others.get(token, 'missing')} in the other"
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(one, name) != getattr(other, name):
            return f"{name} is {getattr(one, name)} and {getattr(other, name)}"
    if one(_PROBE)["input_ids"] != other(_PROBE)["input_ids"]:
        return "they tokenize the same text differently"
    return None
