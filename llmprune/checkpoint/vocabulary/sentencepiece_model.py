"""Rewrite the pieces of a SentencePiece model, which llama.cpp and older tools read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.common.files import apply_umask, fsync
from llmprune.data.vocabulary.segmentation import State, token_ids

_SPECIAL = ("unk_id", "bos_id", "eos_id", "pad_id")


def rewrite_pieces(path: Path, state: State, *, new_ids: Mapping[int, int]) -> bool:
    """Leave the kept pieces in the file, in place. ``state``: the tokenizer.json with all tokens.

    False, and the file is unchanged, where it cannot be read or its pieces are not numbered as the tokens.
    """
    try:
        from transformers.utils import sentencepiece_model_pb2_new

        proto: Any = sentencepiece_model_pb2_new.ModelProto()
        proto.ParseFromString(path.read_bytes())
    except Exception:  # no protobuf, or another kind of file, for which it raises an error of its own
        return False
    tokens = {index: token for token, index in token_ids(state).items()}
    pieces = list(proto.pieces)
    kept = [index for index in sorted(new_ids) if index < len(pieces)]
    if not pieces or any(tokens.get(index, piece.piece) != piece.piece for index, piece in enumerate(pieces)):
        return False
    del proto.pieces[:]
    proto.pieces.extend(pieces[index] for index in kept)
    proto.trainer_spec.vocab_size = len(kept)
    for name in _SPECIAL:
        index = getattr(proto.trainer_spec, name)
        if index >= 0:
            setattr(proto.trainer_spec, name, new_ids.get(index, -1))
    path.write_bytes(proto.SerializeToString())
    apply_umask(path)
    fsync(path)
    return True
