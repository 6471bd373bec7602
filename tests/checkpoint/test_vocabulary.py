"""A checkpoint with fewer tokens: the same logits for those that are left, whose new ids all files have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.trained_tokenizers import trained_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune.anatomy.meta_model import auto_class, build_meta_model, text_config
from llmprune.anatomy.vocabulary import find_vocabulary
from llmprune.checkpoint.vocabulary.cut_checkpoint import CutCheckpoint, VocabularyCut
from llmprune.checkpoint.vocabulary.sentencepiece_model import rewrite_pieces
from llmprune.common.errors import ModelError
from llmprune.data.vocabulary.required import required_tokens
from llmprune.data.vocabulary.segmentation import Segmentation, read_state
from llmprune.recipe.model import ModelSource
from llmprune.testing import tiny_config

ROWS = 512
TEXT = "<s>the quick brown fox"


def cut(folder: Path, family: str, **overrides: object) -> tuple[torch.Tensor, CutCheckpoint]:
    """Save a tiny model with a trained tokenizer, and keep two thirds of its tokens: those of TEXT among them."""
    tokenizer = trained_tokenizer("bytes")
    config = tiny_config(family, **overrides)
    text_config(config).vocab_size = ROWS
    with torch.random.fork_rng(devices=[]):
        auto_class(config).from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    segmentation = Segmentation(read_state(tokenizer))
    kept = set(required_tokens(tokenizer, segmentation, named=[0, 1, 2, 479]).all)
    kept |= segmentation.needs_of_all(tokenizer(TEXT)["input_ids"])
    kept |= set(list({*range(ROWS)} - kept)[: 352 - len(kept)])
    closed = {index for index in kept if segmentation.needs(index) <= kept}
    keep_K = torch.tensor(sorted(closed))
    (folder / "base" / "merges.txt").write_text("#version: 0.2\nt h\nq u\n")
    (folder / "base" / "vocab.json").write_text(json.dumps(segmentation.ids))
    (folder / "base" / "tokens.tiktoken").write_text("old")
    source = ModelSource(id=str(folder / "base"))
    return keep_K, VocabularyCut(source, keep_K, tokenizer).write(folder / "cut", 10**9)


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", False), ("gpt2", True), ("phi", False), ("gemma3", True)],
    ids=lambda value: str(value),
)
def test_logits_of_kept_tokens_are_the_same(family: str, tied: bool, tmp_path: Path) -> None:
    """Embedding, head and its bias lose their rows, tied or not, also in the text part of a larger config."""
    keep_K, found = cut(tmp_path, family)
    places = tmp_path / "base", found.folder
    before, after = (auto_class(tiny_config(family)).from_pretrained(place).eval() for place in places)
    assert bool(after.all_tied_weights_keys) is tied
    assert after.get_input_embeddings().weight.shape[0] == len(keep_K)
    ids, new_ids = (AutoTokenizer.from_pretrained(one)(TEXT, return_tensors="pt").input_ids for one in places)
    assert torch.equal(keep_K[new_ids], ids)
    with torch.no_grad():
        expected = before(input_ids=ids).logits[..., keep_K]
        assert torch.equal(after(input_ids=new_ids).logits, expected)
    assert found.parameters == sum(parameter.numel() for parameter in after.parameters())


def test_files_name_the_new_ids(tmp_path: Path) -> None:
    """Config, generation settings and lists of tokens follow; a list in another form is left out with the reason."""
    keep_K, found = cut(tmp_path, "llama", eos_token_id=[2, 479], pad_token_id=2)
    new = {old: rank for rank, old in enumerate(keep_K.tolist())}
    written = {name: json.loads((found.folder / name).read_text()) for name in ("config.json", "vocab.json")}
    assert written["config.json"]["vocab_size"] == len(keep_K)
    assert written["config.json"]["eos_token_id"] == [new[2], new[479]]
    assert len(written["vocab.json"]) == len(set(written["vocab.json"].values())) < ROWS
    assert (found.folder / "merges.txt").read_text().startswith("#version: 0.2\n")
    assert found.left_out.keys() == {"tokens.tiktoken"}
    assert not (found.folder / "tokens.tiktoken").exists()
    assert {"tokenizer.json", "vocab.json", "merges.txt"} <= set(found.rewritten)
    assert AutoModelForCausalLM.from_pretrained(found.folder).config.vocab_size == len(keep_K)


def test_tokens_in_further_tensors_are_refused() -> None:
    """A model with a second embedding by token says which field sets it."""
    model = build_meta_model(tiny_config("gemma4"))
    with pytest.raises(ModelError, match=r"'gemma4' cannot be cut: vocab_size_per_layer_input sets the size"):
        find_vocabulary(model, trust_remote_code=False)


def test_pieces_of_sentencepiece_are_cut(tmp_path: Path) -> None:
    """The protobuf file keeps the pieces that stay, in order; a file of another kind is left for the caller."""
    pb2 = pytest.importorskip("transformers.utils.sentencepiece_model_pb2_new")
    state = read_state(trained_tokenizer("sentencepiece"))
    names = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    proto = pb2.ModelProto()
    for name in names:
        proto.pieces.add(piece=name, score=0.0)
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    assert rewrite_pieces(path, state, new_ids={0: 0, 2: 1, 300: 2})
    proto.ParseFromString(path.read_bytes())
    assert [piece.piece for piece in proto.pieces] == [names[0], names[2], names[300]]
    assert (proto.trainer_spec.bos_id, proto.trainer_spec.eos_id, proto.trainer_spec.vocab_size) == (-1, 1, 3)
    path.write_text("no protobuf")
    assert not rewrite_pieces(path, state, new_ids={0: 0})
