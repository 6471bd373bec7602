"""Up projections of gated MLPs: found by proof, and solved again for what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import command, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.gated_mlp import find_up
from llmprune.anatomy.selection import slice_rows
from llmprune.anatomy.types import FusedSlice, MlpUnit, PrunableDim
from llmprune.checkpoint.loading import dense_decoder, tensors_of
from llmprune.checkpoint.saving import CheckpointWriter
from llmprune.common.errors import NumericalError
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.width.activation import Activation
from llmprune.cut.apply import add_to_slice, cut_decoder
from llmprune.layerwise.hidden_states import HiddenStates, HiddenStateStore
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.prune.repair.folds import Folds, every_eighth
from llmprune.prune.repair.up_equations import UpEquations, UpRepair
from llmprune.recipe.refit import Refit
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_model

WINDOWS, LENGTH, INPUTS, NEURONS, HIDDEN = 16, 24, 6, 8, 5


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _writes(up_FI: torch.Tensor) -> torch.Tensor:
    """What a change of the up projection adds to the output [N, L, D] of the MLP that ``_solve`` solves."""
    return ((_inputs() @ up_FI.T) * _gates()) @ _down().T


def _inputs() -> torch.Tensor:
    return _normal(WINDOWS, LENGTH, INPUTS, seed=1) * torch.tensor([3.0, 1, 1, 1, 0.5, 0.1])


def _gates() -> torch.Tensor:
    return torch.nn.functional.silu(_normal(WINDOWS, LENGTH, NEURONS, seed=2))


def _down() -> torch.Tensor:
    return _normal(HIDDEN, NEURONS, seed=3)


def _solve(missing_NLD: torch.Tensor, batch_size: int = 4, wanted_NLD: torch.Tensor | None = None) -> UpRepair:
    windows = len(missing_NLD)
    wanted_NLD = torch.ones_like(missing_NLD) if wanted_NLD is None else wanted_NLD
    allocate = lambda _: HiddenStates()  # noqa: E731  # as a walk gives it
    equations = UpEquations(_down(), Folds(every_eighth(windows), batch_size), allocate=allocate)
    for rows in torch.split(torch.arange(windows), batch_size):
        equations.update(
            _inputs()[rows], _gates()[rows], missing_BLD=missing_NLD[rows].clone(), target_BLD=wanted_NLD[rows]
        )
    return equations.solve()


@pytest.mark.parametrize(
    ("family", "tensor", "parts", "entry"),
    [
        ("llama", "mlp.up_proj.weight", (1,), 0),
        ("gemma2", "mlp.up_proj.weight", (1,), 0),
        ("phi3", "mlp.gate_up_proj.weight", (1, 1), 1),
        ("lfm2", "feed_forward.w3.weight", (1,), 0),
        ("granitemoehybrid", "shared_mlp.input_linear.weight", (1, 1), 1),
    ],
)
def test_the_up_projection_is_found(family: str, tensor: str, parts: tuple[int, ...], entry: int) -> None:
    """Whatever it is called, and fused or not: never the gate."""
    units = [unit for units in discover(tiny_model(family).config).units for unit in units if unit.refit]
    assert units
    assert {unit.up for unit in units} == {FusedSlice(PrunableDim(tensor, 0, parts), entry)}


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "nemotron"])
def test_an_mlp_without_gates_has_none(family: str) -> None:
    """An activation function between is no product: GELU, ReLU and its square alike."""
    assert all(unit.up is None for units in discover(tiny_model(family).config).units for unit in units)


@pytest.mark.parametrize("between", [lambda z: z.clamp(-10, 10), torch.relu, torch.tanh, torch.square, lambda z: z + 1])
def test_nothing_may_be_between(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A clamp that small random activations never reach counts too."""
    tensors = {"gate.weight": _normal(8, 4), "up.weight": _normal(8, 4, seed=1), "down.weight": _normal(4, 8, seed=2)}
    cuts = (*(PrunableDim(f"{name}.weight", 0) for name in ("gate", "up")), PrunableDim("down.weight", 1))
    unit = MlpUnit("", cuts, 8, "intermediate_size", 1, None, True)
    x = _normal(1, 16, 4, seed=3)

    def activations(now: dict[str, torch.Tensor], f: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.silu(x @ now["gate.weight"].T) * f(x @ now["up.weight"].T)

    assert find_up(unit, tensors, activations=lambda now: activations(now, between)) is None
    assert find_up(unit, tensors, activations=lambda now: activations(now, lambda z: z)) == FusedSlice(
        PrunableDim("up.weight", 0), 0
    )


def test_strands_partition_the_rows() -> None:
    """Each row of a fused dimension is in one strand, in either layout."""
    for parts in ((1,), (1, 1), (2,)):
        cut = PrunableDim("x", 0, parts)
        rows = [slice_rows(12, FusedSlice(cut, entry)) for entry in range(sum(parts))]
        assert torch.cat(rows).sort().values.tolist() == list(range(12))
    assert slice_rows(6, FusedSlice(PrunableDim("x", 0, (1, 1)), 1)).tolist() == [3, 4, 5]
    assert slice_rows(6, FusedSlice(PrunableDim("x", 0, (2,)), 1)).tolist() == [1, 3, 5]


@pytest.mark.parametrize("dim", [0, 1])
def test_only_the_strand_changes(dim: int) -> None:
    """In both layouts, and not in the tensor that was given, which the dense layer may share."""
    tensor = _normal(6, 4) if dim == 0 else _normal(4, 6)
    before = tensor.clone()
    after = add_to_slice(tensor, FusedSlice(PrunableDim("x", dim, (1, 1)), 1), delta_FI=torch.ones(3, 4))
    assert torch.equal(tensor, before)
    gates, ups = torch.split(after - before, 3, dim=dim)
    assert not gates.any()
    torch.testing.assert_close(ups, torch.ones_like(ups))


def test_what_an_up_projection_can_write_is_written() -> None:
    """A change of the up projection that is missing is found but for the pull, also on the windows held out."""
    wanted_FI = _normal(NEURONS, INPUTS, seed=4)
    missing_NLD = _writes(wanted_FI)
    repair = _solve(missing_NLD)
    assert repair.delta_FI is not None
    assert repair.held_out is not None
    left_NLD = missing_NLD - _writes(repair.delta_FI)
    held_out_N = every_eighth(WINDOWS).bool()
    for windows_N in (held_out_N, ~held_out_N):
        assert left_NLD[windows_N].square().sum() < 0.6 * missing_NLD[windows_N].square().sum()
    change = left_NLD[held_out_N].square().sum() / missing_NLD[held_out_N].square().sum() - 1
    assert repair.held_out == pytest.approx(float(change), abs=1e-4)


def test_batches_of_any_size_solve_the_same() -> None:
    """Windows add up, whatever batch they are in."""
    missing_NLD = _writes(_normal(NEURONS, INPUTS, seed=4)) + _normal(WINDOWS, LENGTH, HIDDEN, seed=5)
    first, second = _solve(missing_NLD, 3), _solve(missing_NLD, 16)
    assert first.held_out == pytest.approx(second.held_out, abs=1e-4)
    assert first.delta_FI is not None
    assert second.delta_FI is not None
    torch.testing.assert_close(first.delta_FI, second.delta_FI, rtol=1e-3, atol=1e-5)


def test_every_token_counts_the_same() -> None:
    """A token whose hidden states and error are a thousand times as long asks for no more than another, and one that
    should get nothing does no harm.
    """
    missing_NLD = _writes(_normal(NEURONS, INPUTS, seed=4))
    loud_NLD, wanted_NLD = missing_NLD.clone(), torch.ones_like(missing_NLD)
    plain = _solve(missing_NLD)
    loud_NLD[:, 0] = 1000 * _normal(WINDOWS, HIDDEN, seed=6)
    wanted_NLD[:, 0] = 1000
    wanted_NLD[:, 1] = 0
    loud = _solve(loud_NLD, wanted_NLD=wanted_NLD)
    assert plain.delta_FI is not None
    assert loud.delta_FI is not None
    apart = (loud.delta_FI - plain.delta_FI).norm() / plain.delta_FI.norm()
    assert apart < 0.3
    assert _solve(loud_NLD).held_out == pytest.approx(0, abs=0.05)  # with its length it drowns the others


def test_noise_is_left_alone() -> None:
    """A step that makes the windows held out worse is not taken, however much better it makes the others."""
    for seed in range(5):
        missing_NLD = _normal(WINDOWS, LENGTH, HIDDEN, seed=10 + seed)
        repair = _solve(missing_NLD)
        assert repair.held_out is not None
        assert repair.held_out <= 0
        assert repair.held_out > -0.05


def test_nothing_to_learn_from() -> None:
    """A single window cannot be held out, and where nothing is missing nothing is solved."""
    assert _solve(_normal(1, LENGTH, HIDDEN)) == UpRepair(None, None)
    assert _solve(torch.zeros(WINDOWS, LENGTH, HIDDEN)) == UpRepair(None, None)


def test_inputs_that_are_not_finite_are_refused() -> None:
    """With what to do about it."""
    allocate = lambda _: HiddenStates()  # noqa: E731  # as a walk gives it
    equations = UpEquations(_down(), Folds(every_eighth(8), 8), allocate=allocate)
    missing_NLD = _normal(8, LENGTH, HIDDEN)
    equations.update(_inputs()[:8] * torch.inf, _gates()[:8], missing_BLD=missing_NLD, target_BLD=missing_NLD)
    with pytest.raises(NumericalError, match=r"refit\.up to false"):
        equations.solve()


def test_every_eighth_window_is_held_out() -> None:
    """Or the last of fewer, but never the only one."""
    assert every_eighth(17).nonzero().flatten().tolist() == [7, 15]
    assert every_eighth(3).tolist() == [0, 0, 1]
    assert every_eighth(1).tolist() == [0]


def _prune(
    family: str, folder: Path, up: bool, store: HiddenStateStore | None = None
) -> tuple[list[LayerRecord], torch.Tensor, list[MlpUnit]]:
    """Records and final logits of a tiny model cut in depth and width and saved, and the units that were refit."""
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
    pruned = cut_decoder(dense, model, anatomy=anatomy, cut=cut)
    writer = CheckpointWriter(folder, pruned.skeleton, layers_path=pruned.layers_path)
    writer.write_rest(tensors_of(pruned.skeleton, skip=pruned.layers_path))
    records, walk = Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=Refit(up=up), write=writer.write_layer).run(
        ids_NL, 4, store=store
    )
    writer.finish(max_shard_size=10_000_000, tokenizer=None)
    return records, walk.logits(0), [unit for layer in cut.layers for unit in anatomy.units[layer] if unit.refit]


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "qwen2_moe", "lfm2"])
def test_a_repaired_model_is_the_saved_one(family: str, tmp_path: Path) -> None:
    """Plain transformers gives the logits that pass 2 ended with; gates are what the cut left, ups are not."""
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
        assert torch.equal(reloaded(ids_NL[:4], use_cache=False).logits, logits_BLV)
    up, plain = (load_file(tmp_path / folder / "checkpoint" / "model.safetensors") for folder in ("up", "plain"))
    changed = {name.split(".", 3)[-1] for name in up if not torch.equal(up[name], plain[name])}
    strands = {unit.up.tensor.name for unit in units if unit.up}
    assert changed == strands | {unit.tensors[-1].name for unit in units}


def test_files_hold_what_memory_does(tmp_path: Path) -> None:
    """What a layer keeps of all windows may lie in files."""
    for name in ("memory", "files"):
        (tmp_path / name).mkdir()
    first, logits_BLV, _ = _prune("llama", tmp_path / "memory", up=True)
    second, same_BLV, _ = _prune("llama", tmp_path / "files", up=True, store=HiddenStateStore(0, tmp_path))
    assert first == second
    assert torch.equal(logits_BLV, same_BLV)


def test_layers_that_lose_no_neurons_are_left_alone() -> None:
    """A cut in depth alone is the same with and without ``up``."""
    model = tiny_model("llama")
    anatomy = discover(model.config)
    ids_NL = torch.randint(3, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(0))
    dense = dense_decoder(model)
    cut = choose_cut(anatomy, None, sizes=PlannedSizes((2,), 3))
    written: list[dict[int, dict[str, torch.Tensor]]] = []
    for refit in (Refit(up=True), Refit()):
        written.append({})
        pruned = cut_decoder(dense, model, anatomy=anatomy, cut=cut)
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
        "calibration": {"tokens": str(folder / "tokens.safetensors"), "key": "calibration"},
        "refit": {"up": True},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe | (sections or {"width": {"mlp": 0.5}})))
    return folder / "recipe.yaml"


def test_a_model_without_gates_is_refused(tmp_path: Path) -> None:
    """Before any weight is read, with what to do."""
    outcome = command("plan", _recipe(tmp_path, "gpt2"))
    assert outcome.code == 2
    assert "refit.up: only the up projections of gated MLPs that lose neurons" in outcome.err
    assert "this model has none; remove the key" in outcome.err


def test_a_single_sample_is_refused(tmp_path: Path) -> None:
    """For nothing says when to stop. The other repairs are made, and the plan says that nobody judges them."""
    outcome = command("plan", _recipe(tmp_path, "llama"), "--set", "calibration.samples=1")
    assert outcome.code == 2
    assert "refit.up: 1 calibration sample leaves no other to judge the refit on; raise" in outcome.err
    outcome = command("plan", tmp_path / "recipe.yaml", "--set", "calibration.samples=1", "--set", "refit={}")
    assert outcome.code == 0
    assert "1 calibration sample leaves no other to judge the refit on" in " ".join(outcome.out.split())


def test_a_cut_of_no_neurons_is_refused(tmp_path: Path) -> None:
    """For it would do nothing."""
    outcome = command("plan", _recipe(tmp_path, "llama", depth={"remove": 1}))
    assert outcome.code == 2
    assert "no neurons of these are removed; narrow them with width, or remove the key" in outcome.err


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_it_goes_with_sparsity_and_heads(family: str, tmp_path: Path) -> None:
    """Cut, repaired and made sparse in one layer: the pattern holds in the up projections too."""
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
