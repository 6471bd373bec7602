"""Sparsity as a part of pass 2: in stages, in every kind of layer, with and without cuts, stopped and continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import command, save_model, verify_here, write_recipe, write_text
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.projections import projections_of
from llmprune.checkpoint.loading import dense_decoder
from llmprune.common.errors import NumericalError, RecipeError
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Tensors
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states import HiddenStateStore
from llmprune.layerwise.staged_layer import StagedLayer, probe
from llmprune.planning.plan import make_plan
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.prune.snapshots import Snapshots
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.sparsity.methods.magnitude import Magnitude
from llmprune.testing import VOCABULARY, tiny_model

WINDOWS = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(0))
FAMILIES = ("llama", "gpt2", "gemma2", "opt", "falcon", "phi", "granite", "mixtral", "qwen2_moe", "bloom", "mamba")
TWO_OF_EIGHT: dict[str, Any] = {"pattern": "2:8"}


class _Stopped(Exception):
    pass


def _prune(
    family: str,
    sparsity: dict[str, Any],
    layers: tuple[int, ...] = (0, 1, 3),
    refit: Refit | None = Refit(),  # noqa: B008  # frozen
    snapshots: Snapshots | None = None,
    store: HiddenStateStore | None = None,
    stop_at: int | None = None,
) -> tuple[dict[int, Tensors], list[LayerRecord], torch.Tensor]:
    """The layers written, the records, and the logits that the run ended with."""
    model = tiny_model(family, num_hidden_layers=4)
    anatomy, dense = discover(model.config), dense_decoder(model)
    cut = Cut(4, layers)
    written: dict[int, Tensors] = {}

    def write(index: int, tensors: Tensors) -> None:
        if index == stop_at:
            raise _Stopped
        written[index] = {name: tensor.clone() for name, tensor in tensors.items()}

    pruned = cut_decoder(dense, model, anatomy=anatomy, cut=cut)
    pruning = Pruning(
        dense, pruned, anatomy=anatomy, cut=cut, refit=refit, write=write, sparsity=Sparsity.model_validate(sparsity)
    )
    records, walk = pruning.run(WINDOWS, 4, snapshots=snapshots, store=store)
    return written, records, walk.logits(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_stages_is_the_layer(family: str) -> None:
    """Run up to each projection, with those behind it replaced by their outputs, it ends as it does in one piece."""
    decoder = dense_decoder(tiny_model(family))
    walk = LayerwiseForward(decoder, WINDOWS, batch_size=4)
    with decoder.layer(0) as layer:
        names = [one.name for one in projections_of(layer)]
        staged = StagedLayer(walk, 0, layer=layer, order=probe(walk, 0, layer=layer, names=names))
        whole = [output_BLD.clone() for *_, output_BLD in walk.outputs(0, layer)]
        for group in staged.order.groups:
            for name in group:
                batches = [batch for batch, _ in staged.inputs(name, keep=True)]
                assert batches == [0, 1, 2]
                staged.finish(name)
        for (_, output_BLD), expected_BLD in zip(staged.outputs(), whole, strict=True):
            assert torch.equal(output_BLD, expected_BLD)
        assert not any("forward" in module.__dict__ for module in layer.modules() if module is not layer)


def test_order_of_a_llama_layer() -> None:
    """Queries, keys and values share an input, gate and up do, and attention and MLP end with a projection."""
    decoder = dense_decoder(tiny_model("llama"))
    walk = LayerwiseForward(decoder, WINDOWS, batch_size=4)
    with decoder.layer(0) as layer:
        order = probe(walk, 0, layer=layer, names=[one.name for one in projections_of(layer)])
    attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
    assert order.groups == (attention, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
    assert {name: owner.path for name, owner in order.owners.items()} == {
        "self_attn.o_proj": "self_attn",
        "mlp.down_proj": "mlp",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_the_pattern(family: str) -> None:
    """Each projection but routers is of the pattern along its inputs, a layer is missing, and all is finite."""
    written, records, logits = _prune(family, TWO_OF_EIGHT)
    assert torch.isfinite(logits).all()
    layer = cut_layer_of(family)
    transposed = {one.name: one.transposed for one in projections_of(layer)}
    for new, record in enumerate(records):
        assert record.matrices
        assert record.error_refit is not None
        for matrix in record.matrices:
            weight = written[new][f"{matrix.name}.weight"]
            weight_OI = weight.T if transposed[matrix.name] else weight
            assert ((weight_OI != 0).reshape(-1, 8).sum(1) <= 2).all()
            assert matrix.kept == pytest.approx(0.25, abs=0.01)


def test_sparse_weights_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose scores are NaN keeps nothing that means anything: the matrix and the method are named."""

    def broken(_: object, weight_OI: Tensor, *__: object, **___: object) -> tuple[Tensor, Tensor]:
        return weight_OI * torch.nan, torch.ones_like(weight_OI, dtype=torch.bool)

    monkeypatch.setattr(Magnitude, "prune", broken)
    sparsity = {"pattern": "2:8", "method": {"kind": "magnitude"}}
    with pytest.raises(NumericalError, match=r"method magnitude: weights of self_attn\.q_proj, .* in layer 0 are not"):
        _prune("llama", sparsity)


def cut_layer_of(family: str) -> nn.Module:
    """The first decoder layer."""
    return dense_decoder(tiny_model(family)).layers[0]


def test_refit_brings_sparse_layers_nearer_to_the_dense_model() -> None:
    """With the refit towards the dense stream the hidden states end nearer to the dense ones than without it."""
    masked = {"pattern": "4:8", "method": {"kind": "sparsegpt", "refit": False}}
    *_, repaired, _ = _prune("llama", {"pattern": "4:8", "method": {"kind": "sparsegpt"}})
    *_, records, _ = _prune("llama", masked)
    assert repaired[-1].error_refit is not None
    final = records[-1].error_refit or records[-1].error_cut
    assert final is not None
    assert repaired[-1].error_refit < final


def test_wanda_alone_needs_no_dense_stream_and_keeps_values() -> None:
    """Without a cut and a refit what stays is what was there, and no error is measured."""
    dense = tiny_model("llama")
    written, records, _ = _prune("llama", {"pattern": "4:8", "method": {"kind": "wanda"}}, (0, 1, 2, 3))
    assert all(record.error_cut is None and record.error_refit is None for record in records)
    for index, tensors in written.items():
        for name, weight in tensors.items():
            before = dense.get_parameter(f"model.layers.{index}.{name}")
            assert torch.equal(weight[weight != 0], before[weight != 0])


def test_in_stages_each_module_still_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wanda sees every input, and runs attention and MLP no more often than magnitude, which sees none."""
    calls = {"attention": 0, "activation": 0}

    def count(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return forward(*args, **kwargs)

        return counted

    sdpa, activation = nn.functional.scaled_dot_product_attention, type(ACT2FN["silu"])
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count("attention", sdpa))
    monkeypatch.setattr(activation, "forward", count("activation", activation.forward))
    found = []
    for method in ("magnitude", "wanda"):
        calls.update(attention=0, activation=0)
        _prune("llama", {"pattern": "2:8", "method": {"kind": method}}, (0, 1, 2, 3))
        found.append(dict(calls))
    assert found[0] == found[1]
    assert min(found[0].values()) >= 12


def test_skipped_matrices_stay_as_they_are() -> None:
    """What ``skip`` names or ``targets`` leaves out keeps every weight, but for the refit of the last projection."""
    dense = tiny_model("llama")
    written, records, _ = _prune("llama", TWO_OF_EIGHT | {"targets": ["mlp.*"], "skip": ["gate_proj"]}, (0, 1, 2, 3))
    assert {matrix.name for record in records for matrix in record.matrices} == {"mlp.up_proj", "mlp.down_proj"}
    for index, tensors in written.items():
        for name in ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight"):
            assert torch.equal(tensors[name], dense.get_parameter(f"model.layers.{index}.{name}"))


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_end_with_the_pattern(rounds: int) -> None:
    """Pruned by and by or at once, the share of zeros is the same."""
    written, *_ = _prune("llama", {"pattern": 0.6, "rounds": rounds}, (0, 1, 2, 3))
    weights = [w for tensors in written.values() for name, w in tensors.items() if "proj" in name]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("stop_at", [0, 2])
def test_continued_equals_uninterrupted(stop_at: int, tmp_path: Path) -> None:
    """A stop between layers changes no bit, and streams on file change none either."""
    whole, _, logits = _prune("granite", TWO_OF_EIGHT)
    with pytest.raises(_Stopped):
        _prune("granite", TWO_OF_EIGHT, snapshots=Snapshots(tmp_path / "state", "same", share=1e9), stop_at=stop_at)
    store = HiddenStateStore(limit=0, folder=tmp_path)
    rest, records, same = _prune("granite", TWO_OF_EIGHT, snapshots=Snapshots(tmp_path / "state", "same"), store=store)
    assert torch.equal(logits, same)
    assert sorted(rest) == list(range(stop_at, 3))
    assert [record.layer for record in records] == [0, 1, 3]
    for index, tensors in rest.items():
        assert all(torch.equal(tensor, whole[index][name]) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk whose matrices hardware could run, and text."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_model(folder / "dense", head_dim=32, **sizes)
    write_text(folder / "text.txt", 200)
    return folder


def _recipe(folder: Path, base: Path, **sections: Any) -> Path:
    calibration = {"dataset": str(base / "text.txt"), "samples": 24, "sequence_length": 32}
    sections = {"calibration": calibration, "depth": None, "width": None} | sections
    return write_recipe(folder / "recipe.yaml", base / "dense", base / "text.txt", **sections)


def test_a_run_proves_the_pattern_in_the_file(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depth, width and 2:4 in one recipe: every group of every matrix in the saved file, counted and reported."""
    verify_here(monkeypatch)
    recipe = _recipe(tmp_path, base, depth={"remove": 1}, width={"mlp": 0.5}, sparsity={"pattern": "2:4"})
    done = command("run", recipe, "--output", tmp_path / "run", "--measure-forward")
    assert done.code == 0, done.err
    assert "2:4 by" in done.out
    tensors = load_file(tmp_path / "run/model/model.safetensors")
    sparse = {name: weight for name, weight in tensors.items() if name.endswith("_proj.weight")}
    assert len(sparse) == 3 * 7
    assert all(((weight != 0).view(-1, 4).sum(1) == 2).all() for weight in sparse.values())
    report = json.loads((tmp_path / "run/report.json").read_text())
    figures = report["sparsity"]
    assert (figures["pattern"], figures["matrices"], figures["violations"]) == ("2:4", 21, 0)
    assert figures["weights"] == sum(weight.numel() for weight in sparse.values()) == 2 * figures["zeros"]
    assert figures["groups"] * 4 == figures["weights"]
    assert len(report["layers"][0]["matrices"]) == 7
    forward = [step["seconds"] for step in report["steps"] if step["name"] == "plain forward pass"]
    last_pass = next(step for step in report["steps"] if step["name"] == "pass 2")
    assert len(forward) == 2
    assert last_pass["forward_ratio"] == pytest.approx(2 * last_pass["seconds"] / sum(forward), abs=1e-3)
    page = (tmp_path / "run/report.html").read_text()
    assert "2:4 sparsity in 21 matrices" in page


def test_a_broken_file_is_not_published(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that comes back while the layers are written stops the run, and no model folder appears."""
    from llmprune.checkpoint.saving import CheckpointWriter

    verify_here(monkeypatch)
    write = CheckpointWriter.write_layer

    def spoil(self: CheckpointWriter, index: int, tensors: Tensors) -> None:
        weight = tensors["mlp.up_proj.weight"]
        weight[0, :4] = 1e-6
        write(self, index, tensors)

    monkeypatch.setattr(CheckpointWriter, "write_layer", spoil)
    done = command("run", _recipe(tmp_path, base, sparsity={"pattern": "2:4"}), "--output", tmp_path / "run")
    assert done.code != 0
    assert "break the pattern 2:4" in done.err
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"sparsity": {"pattern": "4:2"}}, "4 of every 2 weights cannot be kept"),
        ({"sparsity": {"pattern": "2:4", "targets": ["q_prj"]}}, "'q_prj' matches no matrix"),
        ({"sparsity": {"pattern": "2:4", "skip": ["*"]}}, "targets and skip leave none"),
        ({"sparsity": {"pattern": "3:7"}}, "not a multiple of 7"),
        ({"sparsity": {"pattern": "2:4", "method": {"kind": "wonda"}}}, "wanda"),
        ({"sparsity": {"pattern": ["2:4", 0.5]}}, "N:M"),
        ({"sparsity": {"pattern": "2:4", "share": 0.5}}, "share"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(
    sections: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    """Wrong patterns, names and methods are answered with what would work."""
    with pytest.raises(RecipeError, match=said.replace("*", r"\*")):
        make_plan(Recipe.load(_recipe(tmp_path, base, **sections)))


def test_too_few_tokens_says_how_many(base: Path, tmp_path: Path) -> None:
    """A Gram matrix of 128 inputs needs 128 tokens at least; Wanda needs no such matrix."""
    few = {"dataset": str(base / "text.txt"), "samples": 3, "sequence_length": 32}
    with pytest.raises(RecipeError, match="at least 4 windows of 32 tokens"):
        make_plan(Recipe.load(_recipe(tmp_path, base, calibration=few, sparsity={"pattern": "2:4"})))
    wanda = {"pattern": "2:4", "method": {"kind": "wanda"}}
    plan = make_plan(Recipe.load(_recipe(tmp_path, base, calibration=few, sparsity=wanda)))
    assert plan.sparsity is not None
    assert (plan.sparsity.matrices, plan.sparsity.zeros * 2) == (28, plan.sparsity.weights)


def test_matrices_that_cannot_are_listed(tmp_path: Path) -> None:
    """Shapes that hardware does not take, routers and stacked experts stay dense, and the plan says so."""
    save_model(tmp_path / "dense", "mixtral", hidden_size=64, num_attention_heads=4, num_key_value_heads=1)
    write_text(tmp_path / "text.txt", 200)
    calibration = {"dataset": str(tmp_path / "text.txt"), "samples": 24, "sequence_length": 32}
    sections: dict[str, Any] = {"depth": None, "width": None, "calibration": calibration}
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "dense", "-", sparsity={"pattern": "2:4"}, **sections)
    plan = make_plan(Recipe.load(recipe))
    said = " ".join(plan.notes)
    assert "self_attn.k_proj: hardware requires multiples of 32 outputs and 64 inputs" in said
    assert "mlp.experts.down_proj" in said


def test_bench_sparse_without_a_gpu_says_so(base: Path) -> None:
    """No figure is made up where the kernels do not run; and one of the two ways must be chosen."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which test_gpu measures")
    done = command("bench", base / "dense", "--sparse")
    assert done.code != 0
    assert "no CUDA GPU" in done.err
    assert "--against" in command("bench", base / "dense").err


def test_the_card_says_what_is_sparse(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pushed model's card names the pattern and what was counted, and a job is called after it."""
    from llmprune.results.report_file import load_report
    from llmprune.results.sentences import describe_sparsity
    from llmprune.service.jobs.submission import default_name

    verify_here(monkeypatch)
    recipe = _recipe(tmp_path, base, sparsity={"pattern": "2:4", "method": {"kind": "wanda"}})
    assert command("run", recipe, "--output", tmp_path / "run").code == 0
    figures = load_report(tmp_path / "run").sparsity
    assert figures is not None
    assert "2:4 by wanda" in describe_sparsity(figures)
    assert "28 matrices are zero" in describe_sparsity(figures)
    assert default_name(Recipe.load(recipe)) == "dense 2:4 sparse"
