"""The tokens that a text needs, and a tokenizer with only these."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers.trained_tokenizers import KINDS, TRAINED, USED, Kind, trained_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llmprune.anatomy.vocabulary import named_ids, new_ids_of, renumber
from llmprune.common.errors import ModelError, RecipeError, VerificationError
from llmprune.data.vocabulary.choice import VocabularyTarget, choose_tokens
from llmprune.data.vocabulary.comparison import OTHER_TEXTS, TokenizerPair
from llmprune.data.vocabulary.counterparts import ModelTokens, counterparts
from llmprune.data.vocabulary.required import required_tokens
from llmprune.data.vocabulary.rewrite import rewrite_state
from llmprune.data.vocabulary.segmentation import Segmentation, read_state
from llmprune.data.vocabulary.text import CountedText, count_tokens
from llmprune.recipe.text_source import TextSource
from llmprune.recipe.vocabulary import Vocabulary

ROWS = 512  # of the model, some of which the tokenizer has no token for


class Case:
    """A tokenizer, and its tokens counted in text that has half of its words."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.tokenizer = trained_tokenizer(kind)
        self.segmentation = Segmentation(read_state(self.tokenizer))
        self.required = required_tokens(self.tokenizer, self.segmentation, named=[2])
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in USED))
        source = TextSource(dataset=str(path))
        self.text: CountedText = count_tokens([source], self.tokenizer, settings=Vocabulary(), seed=0, tokens=ROWS)

    def choose(self, number: int | None = None, coverage: float | None = None, multiple: int = 8) -> Tensor:
        """Choose tokens; ``coverage``: in place of a number."""
        target = VocabularyTarget(ROWS, multiple, number, coverage)
        return choose_tokens(self.text, self.segmentation, required=self.required, target=target)

    def cut(self, keep_K: Tensor) -> TokenizerPair:
        """Return the tokenizer before and after a cut."""
        new_ids = new_ids_of(keep_K)
        backend = Tokenizer.from_str(json.dumps(rewrite_state(self.segmentation.state, new_ids)))
        after = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
        )
        return TokenizerPair(self.tokenizer, after, new_ids)


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Case]:
    """Make each case once."""
    folder, made = tmp_path_factory.mktemp("vocabulary"), dict[Kind, Case]()

    def case(kind: Kind) -> Case:
        if kind not in made:
            made[kind] = Case(kind, folder)
        return made[kind]

    return case


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_found_again_in_the_base(kind: Kind, case_of: Callable[[Kind], Case]) -> None:
    """By their text, rows without a token by their order; a base that lacks one, or reads otherwise, is refused."""
    case = case_of(kind)
    keep_K = torch.cat([case.choose(320), torch.tensor([ROWS - 9, ROWS - 2])])
    after = case.cut(keep_K[:320]).after
    rows = len(case.tokenizer)
    own, base = ModelTokens(after, 322), ModelTokens(case.tokenizer, ROWS)
    assert counterparts(own, base) == [*keep_K[:320].tolist(), rows, rows + 1]
    assert counterparts(base, base) == list(range(ROWS))
    assert "has 322 tokens in its vocabulary, not 512, and " in counterparts(base, own)
    assert f"has {rows + 1} tokens in its vocabulary, 1 of them without a text, not 322 and 2" == counterparts(
        own, ModelTokens(case.tokenizer, rows + 1)
    )
    other = deepcopy(case.tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert counterparts(own, ModelTokens(other, ROWS)) == "has a tokenizer that reads a text as other tokens"


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_encodes_as_before_or_finer(kind: Kind, case_of: Callable[[Kind], Case]) -> None:
    """Text of kept tokens has the same tokens, and all other text decodes to itself; special tokens stay."""
    case = case_of(kind)
    pair = case.cut(case.choose(coverage=1.0))
    pair.require_special_tokens()
    seen = pair.compare(USED)
    assert seen.same_lines >= 0.95 * seen.lines
    other = pair.compare([*TRAINED, *OTHER_TEXTS])
    assert other.tokens_after > other.tokens_before
    assert pair.after("<|tool|>", add_special_tokens=False)["input_ids"] == [pair.new_ids[len(case.tokenizer) - 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_tokens_is_what_was_asked_for(kind: Kind, case_of: Callable[[Kind], Case]) -> None:
    """A number is met exactly, a coverage by the next multiple, and more tokens cover more."""
    case = case_of(kind)
    few, more = (case.choose(number=number) for number in (320, 400))
    assert (len(few), len(more)) == (320, 400)
    assert set(case.required.all) <= set(few.tolist())
    assert case.text.coverage(few) <= case.text.coverage(more)
    covering = case.choose(coverage=0.95, multiple=16)
    assert len(covering) % 16 == 0
    assert case.text.coverage(covering) >= 0.95
    assert torch.equal(covering, covering.unique())


def test_a_token_needs_those_that_it_is_merged_from() -> None:
    """Keeping a word without the parts of its merges would lose it; the closure has every step of its encoding."""
    segmentation = Segmentation(read_state(trained_tokenizer("bytes")))
    token = segmentation.ids["Ġquick"]
    needs = segmentation.needs(token)
    names = {name for name, index in segmentation.ids.items() if index in needs}
    assert {"Ġ", "q", "u", "i", "c", "k", "Ġquick"} <= names
    assert all(segmentation.needs(one) <= needs for one in needs)


def test_a_source_counts_by_its_weight_and_not_by_its_length(tmp_path: Path) -> None:
    """A short source has the same say as one of fifty times its length."""
    tokenizer = trained_tokenizer("bytes")
    paths = {"long": "the river was frozen\n" * 500, "short": "seven wizards\n" * 10}
    sources = []
    for name, text in paths.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
        sources.append(TextSource(dataset=str(tmp_path / f"{name}.jsonl"), name=name))
    text = count_tokens(sources, tokenizer, settings=Vocabulary(), seed=0, tokens=ROWS)
    river, wizards = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" river", " wizards"))
    assert text.shares_V[wizards] > text.shares_V[river] > 0


def test_too_few_tokens_and_other_tokenizers_are_refused(case_of: Callable[[Kind], Case]) -> None:
    """The message has the tokens that must stay, by reason; WordPiece is named."""
    case = case_of("bytes")
    with pytest.raises(RecipeError, match=r"100 of 512 tokens are fewer than the 2\d\d that must stay \(256 of"):
        VocabularyTarget(ROWS, 8, 100).require(case.required)
    backend = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match=r"WordPiece, and only BPE and Unigram"):
        read_state(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_wrong_tokenizer_is_noticed(case_of: Callable[[Kind], Case]) -> None:
    """Text whose tokens are all kept and that encodes otherwise is an error, as is a text that is lost."""
    case = case_of("bytes")
    pair = case.cut(case.choose(number=400))
    moved = TokenizerPair(pair.before, pair.after, {old: new + 1 for old, new in pair.new_ids.items()})
    with pytest.raises(VerificationError, match="is encoded otherwise, although all its tokens are kept"):
        moved.compare(USED)
    with pytest.raises(VerificationError, match="has the id"):
        moved.require_special_tokens()


def test_ids_in_configs_are_renumbered() -> None:
    """Every field that names a token follows, in all parts; suppressed tokens that are gone leave their lists."""
    new_ids = {0: 0, 2: 1, 5: 2}
    fields = {
        "eos_token_id": [2, 5],
        "text_config": {"pad_token_id": 0, "hidden_size": 2},
        "image_token_index": 5,
        "bos_token_id": None,
        "suppress_tokens": [2, 3],
        "bad_words_ids": [[2, 5], [3]],
    }
    assert named_ids(fields, 6) == {0, 2, 5}
    assert renumber(fields, new_ids, tokens=6) == {
        "eos_token_id": [1, 2],
        "text_config": {"pad_token_id": 0, "hidden_size": 2},
        "image_token_index": 2,
        "bos_token_id": None,
        "suppress_tokens": [1],
        "bad_words_ids": [[1, 2]],
    }
    with pytest.raises(ModelError, match="sequence_bias"):
        renumber({"sequence_bias": [[[3], 1.0]]}, new_ids, tokens=6)
