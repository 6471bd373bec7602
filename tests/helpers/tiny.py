"""Tokenizers small enough to build in a millisecond, for any text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmprune.planning.checks import ErrorCollector
from llmprune.planning.plan import plan_structure
from llmprune.planning.plan_schema import Plan
from llmprune.recipe.recipe import Recipe

CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and ``<|end|>`` (id 256) as the end of text."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def structure_of(recipe: Recipe, *, starts: int = 1, elsewhere: bool = False) -> Plan:
    """The plan from the config alone, wherever text and tokenizer are; other options as in ``plan_structure``."""
    errors = ErrorCollector()
    plan, _ = plan_structure(recipe, errors, starts=starts, elsewhere=elsewhere)
    errors.raise_all()
    assert plan is not None
    return plan


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each printable ASCII character and each byte, in the form of Llama 2's: llama.cpp knows it."""
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def write_sentencepiece_model(path: Path) -> None:
    """Write ``tokenizer.model`` for ``sentencepiece_like_tokenizer``: some families are converted with it alone."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    tokenizer = sentencepiece_like_tokenizer()
    model = pb.ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    for index, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        kind = kinds.get(piece, 6 if piece.startswith("<0x") else 1)
        model.pieces.add(piece=piece, score=-float(index) if kind == 1 else 0.0, type=kind)
    model.trainer_spec.model_type = pb.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = True, False
    path.write_bytes(model.SerializeToString())
