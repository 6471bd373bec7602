"""Recipes with sparsity: whole runs, plans, refusals, and the figures in report, card and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import command, save_model, verify_here, write_recipe, write_text
from safetensors.torch import load_file

from llmprune.common.errors import RecipeError
from llmprune.layerwise.decoder import Tensors
from llmprune.pipeline.report.run_warnings import warn_of_fixed_order
from llmprune.planning.plan import make_plan
from llmprune.prune.records import LayerRecord, MatrixRecord
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.sparsity import Sparsity


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny Llama whose matrices have shapes that sparse kernels take, and text."""
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
    """With depth, width and 2:4 in one recipe every group of every saved matrix has the pattern, as reported."""
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
    assert figures["permuted"] == 3 * 2  # output projections of attention and MLP
    forward = [step["seconds"] for step in report["steps"] if step["name"] == "plain forward pass"]
    last_pass = next(step for step in report["steps"] if step["name"] == "pass 2")
    assert len(forward) == 2
    assert last_pass["forward_ratio"] == pytest.approx(2 * last_pass["seconds"] / sum(forward), abs=1e-3)
    page = (tmp_path / "run/report.html").read_text()
    assert "2:4 sparsity in 21 matrices" in page


def test_a_run_proves_the_pattern_of_experts(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts, some merged into others, get the pattern in the file, which stores each of them for itself."""
    verify_here(monkeypatch)
    save_model(tmp_path / "dense", "mixtral", num_hidden_layers=2)
    sections = {"sparsity": {"pattern": "4:8"}, "experts": {"remove": 1, "method": "merge"}, "depth": None}
    calibration = {"dataset": str(base / "text.txt"), "samples": 24, "sequence_length": 32}
    sections |= {"calibration": calibration, "width": None}
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "dense", base / "text.txt", **sections)
    done = command("run", recipe, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    tensors = load_file(tmp_path / "run/model/model.safetensors")
    experts = [weight for name, weight in tensors.items() if ".experts." in name]
    assert len(experts) == 2 * 3 * 3
    assert all(((weight != 0).view(-1, 8).sum(1) == 4).all() for weight in experts)
    figures = json.loads((tmp_path / "run/report.json").read_text())["sparsity"]
    assert (figures["matrices"], figures["violations"]) == (2 * (4 + 2), 0)
    assert figures["weights"] == 2 * figures["zeros"]


def test_a_broken_file_is_not_published(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nonzero weight that breaks the pattern stops the run before there is a model folder."""
    from llmprune.checkpoint.result.saving import CheckpointWriter

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
        ({"sparsity": {"pattern": "2:4", "skip": ["*"]}}, "targets and skip select none"),
        ({"sparsity": {"pattern": "3:7"}}, "not a multiple of 7"),
        ({"sparsity": {"pattern": "2:4", "method": {"kind": "wonda"}}}, "wanda"),
        ({"sparsity": {"pattern": ["2:4", 0.5]}}, "N:M"),
        ({"sparsity": {"pattern": "2:4", "share": 0.5}}, "share"),
    ],
)
def test_impossible_recipes_are_refused_before_weights_are_read(
    sections: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    """Errors of patterns, names and methods name the valid ones."""
    with pytest.raises(RecipeError, match=said.replace("*", r"\*")):
        make_plan(Recipe.load(_recipe(tmp_path, base, **sections)))


def test_too_few_tokens_are_refused_with_the_number_needed(base: Path, tmp_path: Path) -> None:
    """A Gram matrix of 128 inputs needs at least 128 tokens; Wanda needs no Gram matrix."""
    few = {"dataset": str(base / "text.txt"), "samples": 3, "sequence_length": 32}
    with pytest.raises(RecipeError, match="at least 4 windows of 32 tokens"):
        make_plan(Recipe.load(_recipe(tmp_path, base, calibration=few, sparsity={"pattern": "2:4"})))
    wanda = {"pattern": "2:4", "method": {"kind": "wanda"}}
    plan = make_plan(Recipe.load(_recipe(tmp_path, base, calibration=few, sparsity=wanda)))
    assert plan.sparsity is not None
    assert (plan.sparsity.matrices, plan.sparsity.zeros * 2) == (28, plan.sparsity.weights)


def test_matrices_that_stay_dense_are_listed(tmp_path: Path) -> None:
    """The plan lists matrices of unsupported shapes, routers and stacked experts, which stay dense."""
    save_model(tmp_path / "dense", "mixtral", hidden_size=64, num_attention_heads=4, num_key_value_heads=1)
    write_text(tmp_path / "text.txt", 200)
    calibration = {"dataset": str(tmp_path / "text.txt"), "samples": 24, "sequence_length": 32}
    sections: dict[str, Any] = {"depth": None, "width": None, "calibration": calibration}
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "dense", "-", sparsity={"pattern": "2:4"}, **sections)
    plan = make_plan(Recipe.load(recipe))
    said = " ".join(plan.notes)
    assert "self_attn.k_proj: hardware requires multiples of 32 outputs and 64 inputs" in said
    assert "mlp.experts.down_proj" in said


def test_bench_sparse_without_a_gpu_is_refused(base: Path) -> None:
    """Without a GPU no kernel is measured; without ``--sparse`` and ``--against`` the command asks for one of them."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which test_gpu measures")
    done = command("bench", base / "dense", "--sparse")
    assert done.code != 0
    assert "no CUDA GPU" in done.err
    assert "--against" in command("bench", base / "dense").err


def test_the_card_says_what_is_sparse(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence on the card names pattern, method and number of matrices, and a job's default name the pattern."""
    from llmprune.results.load_report import load_report
    from llmprune.results.sentences.layers import describe_sparsity
    from llmprune.service.jobs.submission import default_name

    verify_here(monkeypatch)
    recipe = _recipe(tmp_path, base, sparsity={"pattern": "2:4", "method": {"kind": "wanda"}})
    assert command("run", recipe, "--output", tmp_path / "run").code == 0
    figures = load_report(tmp_path / "run").sparsity
    assert figures is not None
    assert "2:4 by wanda" in describe_sparsity(figures)
    assert "28 matrices are zero" in describe_sparsity(figures)
    assert default_name(Recipe.load(recipe)) == "dense 2:4 sparse"


def test_an_order_that_no_matrix_has_is_a_warning() -> None:
    """``permute: true`` for matrices that read the residual stream changes nothing, and the report says so."""
    query = LayerRecord(0, None, None, matrices=(MatrixRecord("self_attn.q_proj", 0.5, None),))
    output = LayerRecord(0, None, None, matrices=(MatrixRecord("self_attn.o_proj", 0.5, None, permuted=True),))
    asked = Sparsity.model_validate({"pattern": "2:4", "permute": True})
    assert warn_of_fixed_order(asked, [query])[0].startswith("sparsity.permute: no sparse matrix has inputs")
    assert not warn_of_fixed_order(asked, [query, output])
    assert not warn_of_fixed_order(Sparsity.model_validate({"pattern": "2:4"}), [query])
