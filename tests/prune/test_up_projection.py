"""Refit of up projections in pass 2: in whole models, with cuts of every kind, and in recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import prune_and_save
from helpers.commands import command, save_model, verify_here
from helpers.decoders import dense_decoder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.types import MlpUnit
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.width.activation import Activation
from llmprune.cut.apply import cut_decoder
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.recipe.refit import Refit
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_model


def _prune(
    family: str, folder: Path, up: bool, store: HiddenStateStore | None = None
) -> tuple[list[LayerRecord], torch.Tensor, list[MlpUnit]]:
    """Cut a tiny model in depth and width and save it; return records, final logits and the units that were refit."""
    model = tiny_model(family)
    anatomy = discover(model.config)
    ids_NL = torch.randint(3, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(0))
    dense = dense_decoder(model)
    scores = score(
        dense,
        anatomy,
        criteria=ScoringCriteria(depth=BlockInfluence(), width=Activation()),
        calibration=CalibrationBatches(ids_NL, 4),
    )
    widths = {unit.field: unit.width // unit.times // 2 for units in anatomy.units for unit in units if unit.refit}
    cut = choose_cut(anatomy, scores, sizes=PlannedSizes(None, 3, widths=widths))
    records, forward = prune_and_save(
        model,
        anatomy,
        dense=dense,
        cut=cut,
        ids_NL=ids_NL,
        folder=folder,
        refit=Refit(up=up),
        store=store,
        max_shard_size=10_000_000,
    )
    return records, forward.logits(0), [unit for layer in cut.layers for unit in anatomy.units[layer] if unit.refit]


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "qwen2_moe", "lfm2"])
def test_a_repaired_model_is_the_saved_one(family: str, tmp_path: Path) -> None:
    """The saved model, loaded by transformers, has the logits that pass 2 ended with; only up and down changed."""
    (tmp_path / "up").mkdir()
    (tmp_path / "plain").mkdir()
    records, logits_BLV, units = _prune(family, tmp_path / "up", up=True)
    without, _, _ = _prune(family, tmp_path / "plain", up=False)
    assert all(record.up_held_out is not None and record.up_held_out <= 0 for record in records)
    assert any(record.up_held_out for record in records)
    assert all(record.up_held_out is None for record in without)
    ids_NL = torch.randint(3, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "up" / "checkpoint", dtype="auto")
        torch.testing.assert_close(reloaded(ids_NL[:4], use_cache=False).logits, logits_BLV, rtol=1e-3, atol=1e-4)
    up, plain = (load_file(tmp_path / folder / "checkpoint" / "model.safetensors") for folder in ("up", "plain"))
    changed = {name.split(".", 3)[-1] for name in up if not torch.equal(up[name], plain[name])}
    strands = {unit.up.tensor.name for unit in units if unit.up}
    of_experts = {name for name in changed if ".experts." in name}
    assert changed - of_experts == strands | {unit.tensors[-1].name for unit in units}
    assert all(name.endswith(".down_proj.weight") for name in of_experts)  # they follow what comes before them


def test_files_hold_what_memory_does(tmp_path: Path) -> None:
    """Activations of all windows may be in files."""
    for name in ("memory", "files"):
        (tmp_path / name).mkdir()
    first, logits_BLV, _ = _prune("llama", tmp_path / "memory", up=True)
    second, same_BLV, _ = _prune("llama", tmp_path / "files", up=True, store=HiddenStateStore(0, tmp_path))
    assert first == second
    assert torch.equal(logits_BLV, same_BLV)


def test_up_projections_of_layers_that_lose_no_neurons_are_not_refit() -> None:
    """A cut in depth alone is the same with and without ``up``."""
    model = tiny_model("llama")
    anatomy = discover(model.config)
    ids_NL = torch.randint(3, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(0))
    dense = dense_decoder(model)
    cut = choose_cut(anatomy, None, sizes=PlannedSizes((2,), 3))
    written: list[dict[int, dict[str, torch.Tensor]]] = []
    for refit in (Refit(up=True), Refit()):
        written.append({})
        pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
        records, _ = Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=refit, write=written[-1].__setitem__).run(
            ids_NL, 4
        )
        assert all(record.up_held_out is None for record in records)
    for first, second in zip(written[0].values(), written[1].values(), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def _recipe(folder: Path, family: str, **sections: Any) -> Path:
    save_model(folder / "model", family, **({"hidden_size": 64, "intermediate_size": 256} if sections else {}))
    tokens = torch.randint(0, 100, (16, 32), generator=torch.Generator().manual_seed(0))
    save_file({"calibration": tokens}, folder / "tokens.safetensors")
    recipe = {
        "model": {"id": str(folder / "model")},
        "calibration": {"tokens": str(folder / "tokens.safetensors"), "key": "calibration", "self_generated": 0},
        "refit": {"up": True},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe | (sections or {"width": {"mlp": 0.5}})))
    return folder / "recipe.yaml"


def test_a_model_without_gates_is_refused(tmp_path: Path) -> None:
    """The plan refuses ``refit.up`` before any weight is read, and names the remedy."""
    outcome = command("plan", _recipe(tmp_path, "gpt2"))
    assert outcome.code == 2
    assert "refit.up: only the up projections of gated MLPs that lose neurons" in outcome.err
    assert "this model has none; remove the key" in outcome.err


def test_a_single_sample_is_refused(tmp_path: Path) -> None:
    """No window can be held out to decide when to stop; other refits are made, with a note in the plan."""
    outcome = command("plan", _recipe(tmp_path, "llama"), "--set", "calibration.samples=1")
    assert outcome.code == 2
    assert "refit.up: 1 calibration sample leaves no other to judge the refit on; raise" in outcome.err
    outcome = command("plan", tmp_path / "recipe.yaml", "--set", "calibration.samples=1", "--set", "refit={}")
    assert outcome.code == 0
    assert "1 calibration sample leaves no other to judge the refit on" in " ".join(outcome.out.split())


def test_a_cut_of_no_neurons_is_refused(tmp_path: Path) -> None:
    """``refit.up`` without a cut in width would do nothing."""
    outcome = command("plan", _recipe(tmp_path, "llama", depth={"remove": 1}))
    assert outcome.code == 2
    assert "no neurons of these are removed; narrow them with width, or remove the key" in outcome.err


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_up_projections_are_refit_with_sparsity_and_heads(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With neurons and heads removed, refit and sparsity, the up projections have the pattern too."""
    verify_here(monkeypatch)
    width = {"mlp": 0.5, "heads": 1}
    recipe = _recipe(tmp_path, family, width=width, sparsity={"pattern": "2:4"})
    outcome = command("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(layer["up_held_out"] is not None for layer in report["layers"])
    assert any(layer["up_held_out"] < 0 for layer in report["layers"])
    assert all(layer["mixer_held_out"] is not None for layer in report["layers"])
    assert report["sparsity"]["violations"] == 0
    assert "by up projections" in (tmp_path / "run" / "report.html").read_text()
