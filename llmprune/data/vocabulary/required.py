"""Tokens that are kept whatever the text: the alphabet, special and added tokens, and those of the chat template."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune.data.vocabulary.segmentation import Segmentation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM = [{"role": "system", "content": "System"}]
_TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@dataclass(frozen=True)
class RequiredTokens:
    """Ids of the tokens that a cut of the vocabulary must keep, by the reason; one token may have several reasons."""

    by_reason: dict[str, frozenset[int]]

    @property
    def all(self) -> frozenset[int]:
        """All of them."""
        return frozenset().union(*self.by_reason.values())

    def __str__(self) -> str:
        return ", ".join(f"{len(ids):,} {reason}" for reason, ids in self.by_reason.items() if ids)


def required_tokens(
    tokenizer: PreTrainedTokenizerBase, segmentation: Segmentation, *, named: Collection[int]
) -> RequiredTokens:
    """Return the tokens that must stay, with all that they need. ``named``: ids that the configs name."""
    added = {entry["id"] for entry in segmentation.state["added_tokens"]}
    template = {
        index for text in _template_texts(tokenizer) for index in tokenizer(text, add_special_tokens=False)["input_ids"]
    }
    special = {*tokenizer.all_special_ids, *named} - added  # an added token is found as a whole, without its parts
    reasons = {
        "of the alphabet": segmentation.alphabet() | segmentation.unknown(),
        "special or added": added | segmentation.needs_of_all(special),
        "of the chat template": segmentation.needs_of_all(template - added),
    }
    return RequiredTokens({reason: frozenset(ids) for reason, ids in reasons.items()})


def _template_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the fixed texts of the chat templates, and short conversations that they write."""
    written = tokenizer.chat_template
    if not written:
        return
    from jinja2 import Environment, TemplateError, nodes

    for template in written.values() if isinstance(written, dict) else [written]:
        try:
            parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        except TemplateError:  # a template with tags of its own: the conversations below are what is left
            parsed = nodes.Template([])
        yield from (node.data for node in parsed.find_all(nodes.TemplateData))
        yield from (node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str))
    for messages in (_TURNS[:1], [*_SYSTEM, *_TURNS], _TURNS):
        for prompt in (True, False):
            try:
                yield str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
            except Exception:  # a template is a program of the model's author, and may refuse a system message
                continue
