"""Refit of token mixers after a gap: found in every family, and refit towards the dense hidden states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import command, save_model, verify_here, write_recipe, write_text
from helpers.decoders import dense_decoder
from helpers.tiny import structure_of
from torch import Tensor, nn

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.hooks import inputs_of
from llmprune.anatomy.types import unit_key
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Tensors
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.prune.repair.base import LayerRepair
from llmprune.prune.repair.registry import REPAIRS
from llmprune.prune.repair.token_mixer import TokenMixerRefit
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.refit import Refit
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(0))


def _prune(
    family: str,
    refit: Refit | None = None,
    store: HiddenStateStore | None = None,
    gone: int = 1,
    repairs: tuple[LayerRepair, ...] = REPAIRS,
    groups: int | None = None,
    **overrides: Any,
) -> tuple[list[LayerRecord], dict[int, Tensors], nn.Module, Cut]:
    """Remove one layer of a tiny model, and all key-value groups but the first ``groups``.

    Returns records, written tensors by new index, the dense model and the cut.
    """
    model = tiny_model(family, **overrides)
    anatomy, dense = discover(model.config), dense_decoder(model)
    cut = choose_cut(anatomy, None, sizes=PlannedSizes((gone,), anatomy.num_layers - 1))
    if groups is not None:
        units = enumerate(anatomy.attention)
        heads = {unit_key(index, unit.path): torch.arange(groups) for index, unit in units if unit}
        cut = replace(cut, kv_groups=groups, heads=heads)
    written: dict[int, Tensors] = {}
    pruning = Pruning(
        dense,
        cut_decoder(dense, anatomy=anatomy, cut=cut),
        anatomy=anatomy,
        cut=cut,
        refit=refit or Refit(),
        write=written.__setitem__,
        repairs=repairs,
    )
    records, _ = pruning.run(IDS, 4, store=store)
    return records, written, tiny_model(family, **overrides), cut


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma2", "gpt_neox", "gpt2", "granite", "mixtral", "qwen2_moe", "afmoe", "falcon_h1", "bamba", "lfm2"],
)
def test_token_mixers_after_a_gap_are_refit(family: str) -> None:
    """Attention or recurrence, scaled or normed, parallel to or before an MLP or experts; not before the gap."""
    records, _, _, cut = _prune(family)
    assert cut.layers == (0, 2, 3)
    first, behind, later = (record.mixer_held_out for record in records)
    assert first is None
    assert behind is not None
    assert behind < 0
    assert later is not None
    assert later <= 0


def test_layers_with_several_residual_streams_are_not_refit() -> None:
    """If a layer mixes several residual streams, they do not depend linearly on one projection."""
    records, _, _, _ = _prune("deepseek_v4")
    assert all(record.mixer_held_out is None and record.held_out is None for record in records)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "nemotron_h"])
def test_the_only_projection_of_a_layer_is_refit_once(family: str) -> None:
    """Without an MLP the layer's last projection is refit, for the gap too, and nothing else changes."""
    records, written, _, cut = _prune(family)
    _, plain, _, _ = _prune(family, refit=Refit(ridge=1e9))
    assert all(record.mixer_held_out is None for record in records)
    assert records[0].held_out is not None
    assert records[0].held_out < 0
    assert records[0].error_refit is not None
    assert records[0].error_cut is not None
    assert records[0].error_refit < records[0].error_cut
    for new in range(len(cut.layers)):
        changed = [name for name in written[new] if (written[new][name] - plain[new][name]).abs().max() > 1e-4]
        assert len(changed) <= 1
        assert all(name.endswith(("out_proj.weight", "down_proj.weight", "o_proj.weight")) for name in changed)


def _activations(model: nn.Module, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states before a layer of a llama, and inputs and outputs of its o_proj [T, …]."""
    seen: dict[str, Tensor] = {}
    block: Any = model.get_submodule(f"model.layers.{layer}")
    with (
        torch.no_grad(),
        inputs_of(block, lambda value: seen.__setitem__("hidden", value)),
        inputs_of(block.self_attn.o_proj, lambda value: seen.__setitem__("inputs", value)),
    ):
        model(IDS, use_cache=False)
        inputs_TF = seen["inputs"].flatten(0, 1)
        return seen["hidden"].flatten(0, 1), inputs_TF, block.self_attn.o_proj(inputs_TF)


def test_the_refit_is_the_ridge_solution() -> None:
    """The change solves the ridge problem for the error of h + attention, or a share of it, since all of that error is
    inherited; the problem is computed here from whole forward passes.
    """
    ridge = 0.05
    _, written, model, _ = _prune("llama", refit=Refit(ridge=ridge))
    dense_hidden_TD, _, dense_output_TD = _activations(model, 2)
    layers: Any = model.get_submodule("model.layers")
    layers[0].load_state_dict(written[0])
    before_DF = layers[2].self_attn.o_proj.weight.detach().clone()
    layers[1].forward = lambda hidden_BLD, *_, **__: hidden_BLD
    hidden_TD, inputs_TF, output_TD = _activations(model, 2)
    missing_TD = dense_hidden_TD + dense_output_TD - hidden_TD - output_TD
    gram_FF = inputs_TF.T @ inputs_TF
    gram_FF += ridge * gram_FF.diagonal().mean() * torch.eye(len(gram_FF))
    whole_DF = torch.linalg.solve(gram_FF, inputs_TF.T @ missing_TD).T
    found_DF = written[1]["self_attn.o_proj.weight"] - before_DF
    share = float((found_DF * whole_DF).sum() / whole_DF.square().sum())
    assert 0.1 < share <= 1
    torch.testing.assert_close(found_DF, share * whole_DF, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "groups"), [("llama", None), ("gemma3_text", None), ("olmo2", None), ("gemma3_text", 1)]
)
def test_the_error_of_the_hidden_states_falls(family: str, groups: int | None) -> None:
    """With the refit of token mixers the error after each layer after a gap is lower than without it, also if a norm
    follows them.
    """
    others = tuple(one for one in REPAIRS if not isinstance(one, TokenMixerRefit))
    records, _, _, _ = _prune(family, groups=groups)
    without, _, _, _ = _prune(family, groups=groups, repairs=others)
    assert groups is not None or records[0] == without[0]
    assert all(record.mixer_held_out is None for record in without)
    for one, other in zip(records[1:], without[1:], strict=True):
        assert one.error_refit is not None
        assert other.error_refit is not None
        assert one.error_refit < other.error_refit


def test_routed_experts_are_refit_where_there_is_no_other_mlp() -> None:
    """Before the gap and after it errors are measured before and after the refit of the experts."""
    records, _, _, _ = _prune("mixtral")
    assert all(record.experts is not None for record in records[:2])
    assert all(record.error_cut is not None and record.error_refit is not None for record in records[:2])


def test_files_hold_what_memory_does(tmp_path: Path) -> None:
    """The dense outputs of the token mixer may be in a file."""
    first, tensors, _, _ = _prune("llama")
    second, same, _, _ = _prune("llama", store=HiddenStateStore(0, tmp_path))
    assert first == second
    assert all(torch.equal(tensors[new][name], same[new][name]) for new in tensors for name in tensors[new])


def test_without_the_last_layers_no_mixer_is_refit() -> None:
    """No layer follows that gap."""
    records, _, _, _ = _prune("llama", gone=3)
    assert all(record.mixer_held_out is None for record in records)
    assert records[-1].held_out is not None


def test_the_page_has_a_column_for_the_mixer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out error of the token mixer is in a column of its own."""
    verify_here(monkeypatch)
    save_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", tmp_path / "text.txt", depth={"layers": [1]})
    assert command("run", recipe, "--output", tmp_path / "run").code == 0
    assert "by attention" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(("family", "layers"), [("mamba", "its layers have"), ("nemotron_h", "have")])
def test_the_plan_says_what_is_refit_without_an_mlp(family: str, layers: str, tmp_path: Path) -> None:
    """The plan names the refit projections of models without an MLP, and counts memory for the dense outputs."""
    tiny_model(family).config.save_pretrained(tmp_path)
    text = f"{{model: {{id: '{tmp_path}', dtype: float32}}, calibration: {{dataset: x.txt}}, depth: {{layers: [1]}}"
    plan, without = structure_of(Recipe.parse(text + "}")), structure_of(Recipe.parse(text + ", refit: false}"))
    assert any(
        f"{layers} no MLP that every token reaches: where layers or heads are removed, other" in note
        for note in plan.notes
    )
    assert plan.memory.hidden_states > without.memory.hidden_states
