"""Begin-of-text tokens: the ids that a tokenizer itself puts in front of a plain text.

They are found by tokenising, because a tokenizer may define a bos token that it never adds (SmolLM2, GPT-NeoX) or
append an end token (T5). Gemma, Llama and Mistral add one id; GLM-4 adds two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "One text."


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the first id that the tokenizer puts in front of a plain text; None where it adds none."""
    return next(iter(begin_tokens(tokenizer)), None)


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts in front of a plain text; empty where it adds none."""
    plain, whole = (tokenizer(_PROBE, add_special_tokens=added, verbose=False)["input_ids"] for added in (False, True))
    start = next((start for start in range(len(whole)) if whole[start : start + len(plain)] == plain), 0)
    return tuple(whole[:start])
