"""Tokenizers with merges or scores, trained on a short text in a few milliseconds."""

from __future__ import annotations

import json
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.tiny import CHAT_TEMPLATE

Kind = Literal["bytes", "sentencepiece", "unigram"]
KINDS: tuple[Kind, ...] = ("bytes", "sentencepiece", "unigram")
TOKENS = 480  # of each tokenizer, about
_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_FIRST = "the quick brown fox jumps over a lazy dog while seven wizards quietly mix strange potions near the old stone "
_SECOND = "bridge and nobody remembers whether the river was frozen that winter or merely covered with thin grey ice"
_WORDS = [*_FIRST.split(), *_SECOND.split()]
USED = [" ".join(_WORDS[index % 18 : index % 18 + 5]) + f" {index}.\n" for index in range(120)]  # half of the words
TRAINED = [f"{text}{' '.join(reversed(_WORDS))} ä{index}\n" for index, text in enumerate(USED)]


def trained_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """Return a tokenizer with special tokens, a begin-of-text token and a chat template."""
    backend = {"bytes": _bytes, "sentencepiece": _sentencepiece, "unigram": _unigram}[kind]()
    backend.add_tokens([AddedToken("<|tool|>", normalized=False)])
    begin = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=begin)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _bytes() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(backend, trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=_SPECIAL, initial_alphabet=alphabet))
    return backend


def _sentencepiece() -> Tokenizer:
    """Return byte-pair encoding of characters, with all merges of two tokens that make a third, as in Llama 2."""
    backend = Tokenizer(models.BPE())
    _spaces(backend)
    _train(backend, trainers.BpeTrainer(vocab_size=TOKENS - 256, special_tokens=_SPECIAL, show_progress=False))
    names = [*_SPECIAL, *_BYTES, *(n for n, _ in sorted(backend.get_vocab().items(), key=_index) if n not in _SPECIAL)]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [
        (name[:place], name[place:])
        for name in names[len(_SPECIAL) + 256 :]
        for place in range(1, len(name))
        if name[:place] in vocabulary and name[place:] in vocabulary
    ]
    backend.model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return backend


def _unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    _spaces(backend)
    trainer = trainers.UnigramTrainer(
        vocab_size=TOKENS - 256, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TRAINED, trainer)
    state: dict[str, Any] = json.loads(backend.to_str())
    pieces = state["model"]["vocab"]
    pieces[3:3] = [[name, -20.0] for name in _BYTES]
    state["model"] |= {"unk_id": 0, "byte_fallback": True}
    return Tokenizer.from_str(json.dumps(state))


def _spaces(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _train(backend: Tokenizer, trainer: Any) -> None:
    trainer.show_progress = False
    backend.train_from_iterator(TRAINED, trainer)


def _index(entry: tuple[str, int]) -> int:
    return entry[1]
