"""``llmprune run``: the run folder, its products, and their reuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import (
    LAYERS,
    command,
    copy_of,
    forbid_weights,
    perplexity_of,
    report_in,
    reused_steps,
    save_model,
    states,
    write_recipe,
    write_text,
)

from llmprune.pipeline import inputs

pytestmark = pytest.mark.usefixtures("in_one_process")


PRODUCTS = {
    "recipe.yaml", "plan.json", "scores.safetensors", "layer-scores.safetensors", "cut.json", "cut.safetensors",
    "pruning.json", "evaluation.json", "report.json", "report.html", "run.json", "batch-sizes.json", "model", ".lock",
}  # fmt: skip


STEPS = ("pass 1", "ablation", "pass 2", "saving", "verification", "evaluation")


def test_run_folder_has_every_product(done: Path) -> None:
    """A finished run has the files that the README lists and no leavings."""
    assert {path.name for path in (done).iterdir()} == PRODUCTS
    assert {path.name for path in (done / "model").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip


def test_recipe_is_kept_verbatim(done: Path) -> None:
    """``recipe.yaml`` is the user's file, comments and all."""
    assert (done / "recipe.yaml").read_bytes() == (done.parent / "recipe.yaml").read_bytes()


def test_files_have_the_modes_of_the_umask(done: Path) -> None:
    """Under umask 027 every file is readable by the group and by nobody else."""
    for path in (done).rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_run_prints_dense_against_pruned(done: Path) -> None:
    """The terminal gets a table and the places of the results."""
    printed = (done.parent / "printed.txt").read_text()
    for word in ("parameters", "perplexity", "of dense", str(done / "model"), "report.html"):
        assert word in printed


def test_a_run_alone_does_not_name_its_processes(done: Path) -> None:
    """Without a launcher there is nothing to say about processes."""
    assert "running in" not in (done.parent / "logged.txt").read_text()


def test_result_is_an_ordinary_checkpoint(done: Path) -> None:
    """Plain transformers load it, with the sizes that the plan said."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(done / "model")
    plan = json.loads((done / "plan.json").read_text())
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (LAYERS - 2, 64)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan["pruned"]["parameters"]


def test_second_run_reuses_everything(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command again loads no weights, touches no product and reports the same figures."""
    folder = copy_of(done, tmp_path)
    before, model = report_in(folder), states(folder / "model")
    forbid_weights(monkeypatch)
    assert command("run", done.parent / "recipe.yaml", "--output", folder).code == 0
    assert reused_steps(folder) == dict.fromkeys(STEPS, True)
    assert states(folder / "model") == model
    changing = ("created", "steps", "files")
    after = report_in(folder)
    assert {k: v for k, v in after.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }
    assert [step["seconds"] for step in after["steps"]] == [step["seconds"] for step in before["steps"]]


def test_fresh_starts_over(done: Path, tmp_path: Path) -> None:
    """``--fresh`` makes every product anew, the same, and leaves a user's own file alone."""
    folder = copy_of(done, tmp_path)
    (folder / "notes.txt").write_text("mine")
    (folder / "dense.partial").mkdir()  # what a killed run leaves
    before = states(folder / "model")
    assert command("run", done.parent / "recipe.yaml", "--output", folder, "--fresh").code == 0
    assert set(reused_steps(folder).values()) == {False}
    assert states(folder / "model") == before
    assert {path.name for path in folder.iterdir()} == PRODUCTS | {"notes.txt"}


def test_other_code_makes_everything_anew(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another version of llmprune made is not taken for this one's."""
    folder = copy_of(done, tmp_path)
    monkeypatch.setattr(inputs, "code_fingerprint", lambda: "another")
    assert command("run", done.parent / "recipe.yaml", "--output", folder).code == 0
    assert set(reused_steps(folder).values()) == {False}


def test_another_evaluation_redoes_only_the_evaluation(done: Path, tmp_path: Path) -> None:
    """What pruned the model stays when only what is measured changes."""
    folder = copy_of(done, tmp_path)
    override = "evaluation.perplexity.samples=2"
    assert command("run", done.parent / "recipe.yaml", "--output", folder, "--set", override).code == 0
    assert reused_steps(folder) == {step: step != "evaluation" for step in STEPS}
    assert report_in(folder)["perplexity"]["tokens"] == 2 * 31
    assert report_in(folder)["overrides"] == [override]


def test_another_width_keeps_the_scores(done: Path, tmp_path: Path) -> None:
    """A new target cuts again from the scores that are there, once the finished model is deleted."""
    folder = copy_of(done, tmp_path)
    shutil.rmtree(folder / "model")
    assert command("run", done.parent / "recipe.yaml", "--output", folder, "--set", "width.neurons=32").code == 0
    assert reused_steps(folder) == {step: step in {"pass 1", "ablation"} for step in STEPS}
    assert json.loads((folder / "model" / "config.json").read_text())["intermediate_size"] == 32


def test_edited_cut_is_replayed(done: Path, tmp_path: Path) -> None:
    """Other layers in ``cut.json`` are the layers that the model keeps, and the report says so."""
    folder = copy_of(done, tmp_path)
    cut = json.loads((folder / "cut.json").read_text())
    keep = [0]
    (folder / "cut.json").write_text(json.dumps(cut | {"keep_layers": keep}))
    assert command("run", done.parent / "recipe.yaml", "--output", folder).code == 0
    report = report_in(folder)
    assert reused_steps(folder) == {step: step in {"pass 1", "ablation"} for step in STEPS}
    assert [layer["layer"] for layer in report["layers"] if not layer["removed"]] == keep
    assert json.loads((folder / "model" / "config.json").read_text())["num_hidden_layers"] == 1
    assert any("cut.json was edited" in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep_layers": []}, "at least one of layers 0 to 3"),
        ({"keep_layers": [0, 9]}, "layers 0 to 3"),
        ({"indices": "elsewhere.safetensors"}, "elsewhere.safetensors"),
        pytest.param({"widths": {"intermediate_size": 32}}, "intermediate_size"),
        pytest.param({"keep_layers": [0, 1.5]}, "1.5"),
    ],
)
def test_cut_edited_wrongly(done: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """An edited cut that cannot be is an error of the input, and the model stays as it was."""
    folder = copy_of(done, tmp_path)
    before = states(folder / "model")
    cut = json.loads((folder / "cut.json").read_text())
    (folder / "cut.json").write_text(json.dumps(cut | changes))
    outcome = command("run", done.parent / "recipe.yaml", "--output", folder)
    assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    assert states(folder / "model") == before


@pytest.mark.parametrize("changed", ["model", "text"])
def test_evaluation_follows_what_it_measures(workspace: Path, tmp_path: Path, changed: str) -> None:
    """Another base model, or another held-out text under the same name, is evaluated anew, also without any cut."""
    text = write_text(tmp_path / "text.txt")
    save_model(tmp_path / "base")
    recipe = write_recipe(
        tmp_path / "copy.yaml",
        tmp_path / "base",
        workspace / "text.txt",
        depth=None,
        width=None,
        evaluation=perplexity_of(text),
    )
    assert command("run", recipe, "--output", tmp_path / "out").code == 0
    before = report_in(tmp_path / "out")["perplexity"]
    if changed == "model":
        save_model(tmp_path / "base", seed=1)
    else:
        text.write_text("Other words! " * 100)
    assert command("run", recipe, "--output", tmp_path / "out").code == 0
    assert report_in(tmp_path / "out")["perplexity"] != before


def test_default_output_folder(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``--output`` the run folder is ``runs/`` and the recipe's name."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "mine.yaml", workspace / "base", workspace / "text.txt", width=None, refit=False)
    assert command("run", recipe).code == 0
    assert (tmp_path / "runs" / "mine" / "model" / "config.json").is_file()


def test_no_cut_at_all_copies_the_model(workspace: Path, tmp_path: Path) -> None:
    """Without depth and width every tensor of the result equals the original's bit for bit."""
    from safetensors.torch import load_file

    recipe = write_recipe(tmp_path / "copy.yaml", workspace / "base", workspace / "text.txt", depth=None, width=None)
    assert command("run", recipe, "--output", tmp_path / "out").code == 0
    original = load_file(workspace / "base" / "model.safetensors")
    result = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert original.keys() == result.keys()
    assert all(original[name].equal(result[name]) for name in original)
