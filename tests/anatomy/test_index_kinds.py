"""Kinds that a config derives from a layer's index: which layers can be removed, and how the others are told."""

from __future__ import annotations

import itertools
import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese import GPTNeoXJapaneseAttention

from llmprune.anatomy.config_edits import edit_config
from llmprune.anatomy.depth import find_depth
from llmprune.anatomy.discovery import discover
from llmprune.anatomy.layer_equivalence import check_layer_equivalence, one_of_layers
from llmprune.anatomy.layer_kinds import Kinds, group_size, kinds_of
from llmprune.anatomy.meta_model import build_meta_model
from llmprune.anatomy.types import Anatomy, IndexKinds
from llmprune.common.errors import ModelError, RecipeError
from llmprune.cut.layer_choice import (
    choose_in_pattern,
    layers_in_group,
    may_be_left,
    removable_layers,
    required_kinds,
    smallest_removal,
)
from llmprune.planning.next_tools.tool_compatibility import about_depth
from llmprune.planning.notes.index_kinds import about_index_kinds
from llmprune.planning.sizes.planned_layers import planned_layers
from llmprune.recipe.depth import Depth
from llmprune.score.scores import Scores
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import tiny_config

PERIODS = {"num_hidden_layers": 12, "attn_layer_period": 4, "attn_layer_offset": 2}  # and every second is a mixture
LAYOUTS = ["abababab", "aabaabaa", "abbbbbbb", "abcdefgh", "aaabaaab", "abccabcc"]


@pytest.fixture(scope="module")
def jamba() -> Anatomy:
    """Return the anatomy of twelve layers: attention in each third of four, a mixture in each second of two."""
    return discover(tiny_config("jamba", **PERIODS))


def _removals(kinds: Kinds) -> list[set[int]]:
    """Return all sets of layers that can be removed, by the definition."""
    count = len(kinds)
    return [
        set(range(count)) - set(keep)
        for size in range(1, count + 1)
        for keep in itertools.combinations(range(count), size)
        if all(kinds[old] == kinds[new] for new, old in enumerate(keep))
    ]


def _kept(anatomy: Anatomy, **settings: Any) -> tuple[int, ...]:
    return planned_layers(Depth.model_validate(settings), anatomy)


def _removed(anatomy: Anatomy, **settings: Any) -> list[int]:
    return sorted({*range(anatomy.num_layers)} - {*_kept(anatomy, **settings)})


@pytest.mark.parametrize(
    ("family", "fields", "group"),
    [
        ("jamba", PERIODS, 4),
        ("jamba", {"num_hidden_layers": 12, "expert_layer_period": 3}, 6),
        ("ernie4_5_moe", {"num_hidden_layers": 8, "moe_layer_interval": 2}, 2),
        ("modernbert-decoder", {}, 1),  # its first layer has no norm
        ("diffllama", {}, None),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, None),
    ],
)
def test_kinds_by_index_agree_with_the_proof(family: str, fields: dict[str, Any], group: int | None) -> None:
    """Sets of layers that the kinds allow are those whose pruned model has equal layers."""
    model = build_meta_model(tiny_config(family, **fields))
    by_index, refusal = find_depth(model, trust_remote_code=False)
    assert refusal is None
    count, chooser = model.config.num_hidden_layers, random.Random(0)
    kinds = kinds_of(by_index, count)
    assert group_size(kinds) == group
    needed = set(one_of_layers(model.config))
    possible = [one for one in _removals(kinds) if 0 < len(one) <= count // 2 and (not needed or needed - one)]
    others = [set(chooser.sample(range(count), chooser.randint(1, count // 2))) for _ in range(4)]
    for removed in [*chooser.sample(possible, min(4, len(possible))), *others]:
        keep = [index for index in range(count) if index not in removed]
        pruned = build_meta_model(edit_config(model.config, keep, widths={}))
        refused = pytest.raises(ModelError, match=r"cannot express|full-attention")
        with nullcontext() if removed in possible else refused:
            check_layer_equivalence(model, pruned, keep=keep, changing=set())


def test_a_last_layer_of_its_own_kind_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last layer has a bias, wherever it is: the scores choose among the others, and named layers are refused.

    Of two such layers none can go without the other, which no cut can express.
    """
    config = tiny_config("gpt_neox_japanese")
    found = discover(config)
    assert (found.one_of, found.depth_refusal) == ((3,), None)
    for worst in range(4):
        scores_N = torch.ones(4, dtype=torch.float64).index_fill(0, torch.tensor([worst]), 0.0)
        keep = choose_in_pattern(scores_N, 3, anatomy=found, keep_pattern=False)
        pruned = build_meta_model(edit_config(config, keep, widths={}))
        check_layer_equivalence(build_meta_model(config), pruned, keep=keep, changing=set())
    build = GPTNeoXJapaneseAttention.__init__

    def last_two(self: Any, config: Any, use_bias: bool, layer_idx: int) -> None:
        build(self, config, use_bias=layer_idx >= config.num_hidden_layers - 2, layer_idx=layer_idx)

    monkeypatch.setattr(GPTNeoXJapaneseAttention, "__init__", last_two)
    refusal = find_depth(build_meta_model(config), trust_remote_code=False)[1]
    assert "layer 1 would keep its index and still change" in str(refusal)


def test_cross_attention_between_layers_is_refused() -> None:
    """Its place follows from the index of the layer behind it, which the layers themselves do not show."""
    with pytest.raises(ModelError, match=r"idefics.*reads no text without images"):
        discover(tiny_config("idefics", num_hidden_layers=9, cross_layer_interval=4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_removable_layers_and_the_smallest_removal_are_those_of_all_sets(layout: str) -> None:
    """Both agree with a search of all sets of layers."""
    kinds = tuple((kind,) for kind in layout)
    removals = _removals(kinds)
    for number in range(1, len(kinds)):
        some = [removed for removed in removals if len(removed) == number]
        assert removable_layers(kinds, number) == tuple(sorted(set[int]().union(*some)))
    for named in itertools.combinations(range(len(kinds)), 2):
        found, wider = set(smallest_removal(kinds, named)), [one for one in removals if one >= set(named)]
        if not wider:  # without both no layer can be at the first index
            assert len(found) == len(kinds)
            continue
        assert found in wider
        assert len(found) == min(map(len, wider))


@pytest.mark.parametrize("layers", [(3, 4, 5, 6), (0, 1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8), (11,), (10, 11)])
def test_named_layers_that_keep_the_kinds_in_place_are_removed(layers: tuple[int, ...], jamba: Anatomy) -> None:
    """Whole periods from anywhere, and any number from the end."""
    assert _removed(jamba, layers=layers) == list(layers)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (
            (3,),
            "depth.layers: without layer 3, layer 4 would become layer 3, and this model's config derives the kind of "
            "a layer from its index: .* for 3, .* for 4; name layers 3–6, 4 layers that can be removed together, or "
            "give depth.remove: 4 and let the scores choose",
        ),
        ((1, 8), "without layers 1, 8, layer 2 would become layer 1, .* name layers 1–4, 8–11, 8 layers that can"),
        ((2, 6, 10), "give depth.remove: 3 and let the scores choose"),  # no layer with attention would be left
    ],
)
def test_other_named_layers_are_refused_with_those_that_can_go(
    layers: tuple[int, ...], sentence: str, jamba: Anatomy
) -> None:
    """The message has the first layer that would change, both kinds, and the nearest layers that can be removed."""
    with pytest.raises(RecipeError, match=sentence):
        _kept(jamba, layers=layers)


def test_a_number_of_layers_leaves_a_choice_or_a_note_says_which_can_go(jamba: Anatomy) -> None:
    """Whole groups are chosen by the scores; of one layer only the last can be removed."""
    assert _removed(jamba, remove=4) == [5, 6, 7, 8]
    (free,) = about_index_kinds(Depth(remove=4), jamba, keep=_kept(jamba, remove=4))
    assert "the scores choose 4 of layers 0–11 so that the others are at indices of their kind" in free
    assert _removed(jamba, keep=11) == [11]
    (forced,) = about_index_kinds(Depth(keep=11), jamba, keep=_kept(jamba, keep=11))
    assert "only layer 11 can be removed; remove 4 for a free choice among groups of 4" in forced
    with pytest.raises(RecipeError, match=r"none of the first 2 of 12 layers has full attention.* keep 3–12 layers"):
        _kept(jamba, keep=2)
    assert not about_index_kinds(Depth(layers=(11,)), jamba, keep=_kept(jamba, layers=(11,)))


def test_a_pattern_that_follows_from_the_index_is_at_no_risk(jamba: Anatomy) -> None:
    """The scores cannot break it, so no note asks for ``keep_pattern``; other patterns keep theirs."""
    keep = _kept(jamba, remove=4)
    assert about_depth(jamba, keep, named=False, keep_pattern=False) == []
    assert about_depth(replace(jamba, by_index=()), keep, named=False, keep_pattern=False)


def test_the_scores_choose_among_the_sets_that_can_go(jamba: Anatomy) -> None:
    """Of all sets of four layers that can be removed, those with the lowest sum of scores are."""
    kinds = required_kinds(jamba, keep_pattern=False)
    removals = [removed for removed in _removals(kinds) if len(removed) == 4]
    for seed in range(4):
        scores_N = torch.rand(12, generator=torch.Generator().manual_seed(seed))
        cut = choose_cut(jamba, Scores(scores_N, {}), sizes=PlannedSizes(None, 8))
        assert set(cut.removed) == min(removals, key=lambda removed: float(scores_N[sorted(removed)].sum()))


def test_a_model_may_be_left_with_layers_in_place(jamba: Anatomy) -> None:
    """A search removes whole groups, and keeps one of the layers that the model needs."""
    assert layers_in_group(jamba) == 4
    assert may_be_left(jamba, range(4, 12))
    assert not may_be_left(jamba, range(1, 12))
    assert not may_be_left(jamba, [0, 1])
    free = replace(jamba, by_index=(), one_of=())
    assert layers_in_group(free) == 1
    assert may_be_left(free, [5])
    one = replace(jamba, by_index=(IndexKinds("scale", tuple(map(str, range(12)))),), one_of=())
    assert _removed(one, remove=3) == [9, 10, 11]
