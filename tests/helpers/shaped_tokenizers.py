"""Small tokenizers with the post-processors and special tokens of real models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Shape:
    """Special tokens of a tokenizer. ``begins``: those that its post-processor puts in front of a text."""

    begins: tuple[str, ...]
    eos: str
    bos: str | None = None
    sentencepiece: bool = False  # characters with byte fallback and "▁" for a space, instead of bytes


SHAPES = {
    "gemma3": Shape(("<bos>",), "<eos>", bos="<bos>", sentencepiece=True),
    "llama3": Shape(("<|begin_of_text|>",), "<|end_of_text|>", bos="<|begin_of_text|>"),
    "mistral": Shape(("<s>",), "</s>", bos="<s>", sentencepiece=True),
    "opt": Shape(("</s>",), "</s>", bos="</s>"),
    "glm4": Shape(("[gMASK]", "<sop>"), "<|endoftext|>"),
    "qwen": Shape((), "<|endoftext|>"),
    "smollm2": Shape((), "<|im_end|>", bos="<|im_start|>"),
}
ADDING = [name for name, shape in SHAPES.items() if shape.begins]


def shaped_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of about one token a byte with the special tokens of a real model, which come first."""
    shape = SHAPES[name]
    special = list(dict.fromkeys([*shape.begins, shape.eos, *([shape.bos] if shape.bos else [])]))
    backend = _sentencepiece(special) if shape.sentencepiece else _bytes(special)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if shape.begins:
        ids = {token: backend.token_to_id(token) for token in shape.begins}
        single: Any = processors.TemplateProcessing(
            single=" ".join((*shape.begins, "$A")), pair=None, special_tokens=list(ids.items())
        )
        backend.post_processor = (
            single if shape.sentencepiece else processors.Sequence([processors.ByteLevel(trim_offsets=True), single])
        )
    elif not shape.sentencepiece:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=shape.eos, bos_token=shape.bos)


def _bytes(special: list[str]) -> Tokenizer:
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(special: list[str]) -> Tokenizer:
    letters = [chr(code) for code in range(32, 127)]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters[1:]]
    model = models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[], byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
