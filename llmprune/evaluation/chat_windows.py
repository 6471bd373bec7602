"""Conversations that a model writes itself: first the user's turn, after the chat template's opening, then the answer.

An instruct model that gets nothing but the opening of a user's turn writes what its training had there, so no question
is needed (Magpie, arXiv 2406.08464).

Shapes: B windows, P prompt tokens, L sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune.data.begin_of_text import begin_tokens
from llmprune.evaluation.decoding import Sampling, end_tokens, generate
from llmprune.evaluation.prompts import Ids, begun

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_QUESTION = "llmprunequestion"  # found again in what the template writes
_LEAST_OF_TURN = 4  # tokens of a user's turn
_SHARE_OF_TURN = 4  # the user's turn takes at most a quarter of a window


@dataclass(frozen=True)
class ChatTurns:
    """Token ids that the chat template writes before a user's turn, and between this and the answer."""

    user: Ids
    answer: Ids

    def fits(self, length: int) -> bool:
        """Check that a window of ``length`` tokens has room for a conversation."""
        return 2 * (len(self.user) + len(self.answer) + _LEAST_OF_TURN) <= length


def chat_turns(tokenizer: PreTrainedTokenizerBase, *, begin: Ids, vocabulary: int) -> ChatTurns | None:
    """Return what the tokenizer's chat template writes around a user's turn.

    ``begin``: the ids that a window begins with; ``vocabulary``: number of the model's token ids. None where there is
    no template, or it does not write a turn as it is given.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    try:
        written = tokenizer.apply_chat_template(
            [{"role": "user", "content": _QUESTION}], add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, ValueError, TypeError):
        return None
    parts = str(written).split(_QUESTION)
    if len(parts) != 2:
        return None
    user, answer = (tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts)
    user = begun(user, begin, own=begin_tokens(tokenizer))
    if not user or not answer or max(*user, *answer) >= vocabulary:
        return None
    return ChatTurns(user, answer)


def write_chats(model: PreTrainedModel, turns: ChatTurns, *, count: int, length: int, temperature: float) -> Tensor:
    """Sample windows int64 [count, L] on the model's device, each beginning with a user's turn and its answer.

    An end of the answer does not end a window.
    """
    import torch

    opening_BP = torch.tensor([turns.user]).repeat(count, 1)
    ends = end_tokens(model) | {turns.answer[0]}
    asking = Sampling(length // _SHARE_OF_TURN, ends, temperature=temperature, least_tokens=_LEAST_OF_TURN)
    asked_BP = generate(model, opening_BP, settings=asking)[:, opening_BP.shape[1] :]
    prompts = [(*turns.user, *_until(row, ends), *turns.answer)[:length] for row in asked_BP.tolist()]
    longest, shortest = max(map(len, prompts)), min(map(len, prompts))
    padded_BP = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BP = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    answering = Sampling(max(length - shortest, 1), temperature=temperature)
    written = generate(model, padded_BP, settings=answering, mask_BP=mask_BP)
    starts = [longest - len(prompt) for prompt in prompts]
    return torch.stack([row[start : start + length] for row, start in zip(written, starts, strict=True)])


def _until(ids: list[int], ends: frozenset[int]) -> list[int]:
    """Return the ids before the first that is an end."""
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)
