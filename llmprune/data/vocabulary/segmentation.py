"""Dependencies between the tokens of a tokenizer: which tokens the encoding of others passes through.

Byte-pair encoding merges two tokens into a third, in the order of the merges (Sennrich et al., arXiv 1508.07909). A
token that is made of others can only be kept with them. Then a text whose tokens are all kept encodes as before: no
merge within them is missing, and removed merges only make way for later ones. A unigram model (Kudo, arXiv 1804.10959)
scores whole segmentations, so its tokens do not depend on each other: the best segmentation of a text stays the best
while its tokens stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llmprune.common.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

State = dict[str, Any]  # a tokenizer.json
KINDS = ("BPE", "Unigram")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def read_state(tokenizer: PreTrainedTokenizerBase) -> State:
    """Return the tokenizer.json of a loaded tokenizer. Raises ModelError for a tokenizer whose tokens cannot be cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"vocabulary: the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json; convert it to "
            "one (save it with save_pretrained after loading it with the tokenizers library), or remove vocabulary"
        )
    state: State = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] not in KINDS:
        raise ModelError(
            f"vocabulary: the tokenizer's model is {model['type']}, and only {' and '.join(KINDS)} can lose tokens; "
            "remove vocabulary"
        )
    affixes = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if affixes:
        raise ModelError(
            f"vocabulary: the tokenizer marks parts of words by {affixes[0]}, and its tokens cannot be cut; "
            "remove vocabulary"
        )
    return state


def token_ids(state: State) -> dict[str, int]:
    """Return the id of each token of the model section, without tokens that were added to it."""
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: index for index, (piece, _) in enumerate(vocabulary)}


@dataclass(frozen=True)
class Segmentation:
    """The tokens that each token of a tokenizer needs, by the model section of its tokenizer.json."""

    state: State

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of each token of the model section."""
        return token_ids(self.state)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {index: token for token, index in self.ids.items()}

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(merges_of(self.state))}

    @property
    def has_byte_fallback(self) -> bool:
        """True where a character without a token becomes its bytes."""
        return bool(self.state["model"].get("byte_fallback")) and all(token in self.ids for token in _BYTES)

    def alphabet(self) -> set[int]:
        """Return the tokens that every text can be written in: bytes, or single characters where there are none.

        A unigram model keeps its characters too, and its lowest score: the penalty of an unknown character depends on
        both.
        """
        bytes_, characters = set(), {index for token, index in self.ids.items() if len(token) == 1}
        if self.has_byte_fallback:
            bytes_ = {self.ids[token] for token in _BYTES}
            if self._is_bpe:
                return bytes_
        if not self._is_bpe:
            scores = [score for _, score in self.state["model"]["vocab"]]
            characters.add(scores.index(min(scores)))
        return bytes_ | characters

    def unknown(self) -> set[int]:
        """Return the id of the unknown token, if there is one."""
        model = self.state["model"]
        if self._is_bpe:
            return {self.ids[model["unk_token"]]} if model.get("unk_token") in self.ids else set()
        return set() if model.get("unk_id") is None else {model["unk_id"]}

    def needs(self, token: int) -> set[int]:
        """Return a token and those that byte-pair encoding passes through on the way to it."""
        name = self._names.get(token)
        if name is None or not self._is_bpe or len(name) == 1:
            return {token}
        found, parts = {token}, list(name)
        while True:
            found |= {self.ids[part] for part in parts if part in self.ids}
            pairs = list(pairwise(parts))
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in pairs]
            if not ranks or min(ranks) == len(self._ranks):
                return found
            place = ranks.index(min(ranks))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]

    def needs_of_all(self, tokens: Iterable[int]) -> set[int]:
        """Return tokens with all that they need."""
        return {needed for token in tokens for needed in self.needs(token)}

    @property
    def _is_bpe(self) -> bool:
        return bool(self.state["model"]["type"] == "BPE")


def merges_of(state: State) -> list[tuple[str, str]]:
    """Return the merges of byte-pair encoding in their order; of older files as pairs too."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in state["model"]["merges"])
    return [(first, second) for first, second in pairs]
