"""Bits per byte of held-out text: the one measure of prediction that models with different tokens share.

Shapes: N windows, L tokens of a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune.data.windows import TextWindows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedText:
    """Token windows, int64 [N, L], and the bytes and tokens of their text that are predicted."""

    windows_NL: Tensor
    begin: tuple[int, ...]
    bytes: int
    tokens: int

    @classmethod
    def of(cls, windows_NL: Tensor, tokenizer: PreTrainedTokenizerBase, *, begin: tuple[int, ...]) -> EncodedText:
        """Return windows with the bytes of their text; the first token of each, and ``begin``, are not predicted."""
        rows = [[index for index in row if index not in begin] for row in windows_NL[:, 1:].tolist()]
        texts = [_decoded(tokenizer, row) for row in rows]
        return cls(windows_NL, begin, sum(len(text.encode("utf-8", "replace")) for text in texts), sum(map(len, rows)))

    def bits(self, perplexity: float) -> float:
        """Return the bits per byte of a model with this perplexity on the windows."""
        return math.log2(perplexity) * self.tokens / max(self.bytes, 1)


def encode_again(
    held_out: TextWindows, *, before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase
) -> Tensor | None:
    """Return the text of held-out windows in the tokens of another tokenizer, int64 [N, L], cut off at L tokens.

    The begin-of-text ids, which are special tokens of both, go in front. Windows that encode into fewer tokens are left
    out; None where no window is left.
    """
    length, rows = held_out.windows_NL.shape[1], []
    names = before.convert_ids_to_tokens(list(held_out.begin))
    begin = after.convert_tokens_to_ids(names) if names else []
    for row in held_out.windows_NL.tolist():
        content = row[len(begin) :] if tuple(row[: len(begin)]) == held_out.begin else row
        ids = [*begin, *after(_decoded(before, content), add_special_tokens=False)["input_ids"]]
        if len(ids) >= length:
            rows.append(ids[:length])
    return torch.tensor(rows) if rows else None


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
