"""Counterparts of a model's tokens in a model that has more: the same tokens under other ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune.common.errors import VerificationError
from llmprune.data.vocabulary.comparison import TokenizerPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "One text, with numbers (12.5) and code: `x = [i for i in range(3)]`.\n\nÜber 日本."


@dataclass(frozen=True)
class ModelTokens:
    """Tokens of a model: its tokenizer, and the number of rows of its embedding, of which some may have no token."""

    tokenizer: PreTrainedTokenizerBase
    rows: int

    @property
    def ids(self) -> dict[str, int]:
        """Id of each token that the model has a row for."""
        return {token: index for token, index in self.tokenizer.get_vocab().items() if index < self.rows}

    @property
    def without_token(self) -> list[int]:
        """Rows that no token has, ascending."""
        named = set(self.ids.values())
        return [index for index in range(self.rows) if index not in named]


def counterparts(own: ModelTokens, other: ModelTokens) -> list[int] | str:
    """Return the id of every row of ``own`` in ``other``, or the reason why ``other`` has not all tokens of ``own``.

    Rows without a token, such as padding, are matched in their order. A text that ``other`` encodes in tokens that
    ``own`` has must be the same tokens to both.
    """
    ids, other_ids = own.ids, other.ids
    missing = next((token for token in ids if token not in other_ids), None)
    if missing is not None:
        return f"has {other.rows:,} tokens in its vocabulary, not {own.rows:,}, and {missing!r} is not among them"
    found = {index: other_ids[token] for token, index in ids.items()}
    unnamed, other_unnamed = own.without_token, other.without_token
    if len(unnamed) > len(other_unnamed):
        return (
            f"has {other.rows:,} tokens in its vocabulary, {len(other_unnamed):,} of them without a text, not "
            f"{own.rows:,} and {len(unnamed):,}"
        )
    found |= dict(zip(unnamed, other_unnamed, strict=False))
    pair = TokenizerPair(other.tokenizer, own.tokenizer, {theirs: ours for ours, theirs in found.items()})
    try:
        pair.compare([_PROBE])
    except VerificationError:
        return "has a tokenizer that reads a text as other tokens"
    return [found[index] for index in range(own.rows)]
