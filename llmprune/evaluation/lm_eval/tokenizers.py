"""Comparison of tokenizers: scores per sample are comparable only if both models see the same tokens.

A model that lost tokens of its vocabulary has those of its base under other ids; a word whose token it lost is several
of those that it kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.common.errors import EvaluationError
from llmprune.data.vocabulary.counterparts import ModelTokens, counterparts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# letters, capitals, digits, code, accents, other scripts, repeated spaces
_PROBE = "The quick brown Fox, 12345.67 + x_9;\n\tdef f(a):  return a\n\nnaïve Straße – 日本語 مرحبا 🙂   end "


def require_same_tokenizer(
    base: str, tokenizer: PreTrainedTokenizerBase | None, *, model: str, other: PreTrainedTokenizerBase | None
) -> None:
    """Raise EvaluationError unless both models have the same vocabulary, special tokens and tokenization.

    ``base`` and ``model`` name the models, ``tokenizer`` and ``other`` are their tokenizers. The model may have lost
    tokens of the base.
    """
    assert tokenizer is not None, "both are loaded"
    assert other is not None, "both are loaded"
    difference = _difference(tokenizer, other)
    if difference and not _lost_tokens(other, tokenizer):
        raise EvaluationError(
            f"the tokenizers of {base} and {model} differ: {difference}; scores of models with different tokens "
            "are not comparable sample by sample: evaluate each alone, or give both the same tokenizer"
        )


def _lost_tokens(own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> bool:
    """Check that a model has fewer tokens than its base and otherwise reads texts alike."""
    if len(own) >= len(base) or (own.bos_token, own.eos_token) != (base.bos_token, base.eos_token):
        return False
    sides = (ModelTokens(tokenizer, max(tokenizer.get_vocab().values()) + 1) for tokenizer in (own, base))
    return not isinstance(counterparts(*sides), str)


def _difference(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    vocabulary, other_vocabulary = tokenizer.get_vocab(), other.get_vocab()
    if vocabulary != other_vocabulary:
        if len(vocabulary) != len(other_vocabulary):
            return f"{len(vocabulary):,} tokens and {len(other_vocabulary):,}"
        token = next(token for token, index in vocabulary.items() if other_vocabulary.get(token) != index)
        index = other_vocabulary.get(token, "missing")
        return f"the token {token!r} is {vocabulary[token]} in one and {index} in the other"
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) != getattr(other, name):
            return f"{name} is {getattr(tokenizer, name)} and {getattr(other, name)}"
    if tokenizer(_PROBE)["input_ids"] != other(_PROBE)["input_ids"]:
        return "they tokenize the same text differently"
    return None
