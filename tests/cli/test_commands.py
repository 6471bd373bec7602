"""The command as a person uses it, on tiny models in this process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import LAYERS, TASKS, command, save_model, states, verify_here, write_recipe, write_text

from llmprune.testing import tiny_config

PRODUCTS = {
    "recipe.yaml", "plan.json", "scores.safetensors", "cut.json", "cut.safetensors", "pruning.json", "evaluation.json",
    "report.json", "report.html", "run.json", "model", ".lock",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_here(monkeypatch)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` (a model), ``text.txt``, ``recipe.yaml``, and ``done``, a finished run of it."""
    folder = tmp_path_factory.mktemp("room")
    text = write_text(folder / "text.txt")
    save_model(folder / "base")
    recipe = write_recipe(folder / "recipe.yaml", folder / "base", text, evaluation=evaluation(text))
    recipe.write_text(f"# kept as it is\n{recipe.read_text()}")
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        before = os.umask(0o027)
        try:
            outcome = command("run", recipe, "--output", folder / "done")
        finally:
            os.umask(before)
    assert outcome.code == 0, outcome.err
    (folder / "printed.txt").write_text(outcome.out)
    return folder


def evaluation(text: Path, **more: Any) -> dict[str, Any]:
    """An evaluation section that measures perplexity."""
    return {"perplexity": {"dataset": str(text), "samples": 4, "sequence_length": 32}} | more


def copy_of_done(room: Path, tmp_path: Path) -> Path:
    """The finished run, to be changed."""
    shutil.copytree(room / "done", tmp_path / "again")
    return tmp_path / "again"


def report_in(folder: Path) -> dict[str, Any]:
    """The report of a run folder."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


STEPS = ("pass 1", "pass 2", "saving", "verification", "evaluation")


def reused(folder: Path) -> dict[str, bool]:
    """By step of the last run, whether its product was reused."""
    return {step["name"]: step["reused"] for step in report_in(folder)["steps"]}


def test_run_folder_has_every_product(room: Path) -> None:
    """A finished run has the files that the README lists and no leavings."""
    assert {path.name for path in (room / "done").iterdir()} == PRODUCTS
    assert {path.name for path in (room / "done" / "model").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip


def test_recipe_is_kept_verbatim(room: Path) -> None:
    """``recipe.yaml`` is the user's file, comments and all."""
    assert (room / "done" / "recipe.yaml").read_bytes() == (room / "recipe.yaml").read_bytes()


def test_files_have_the_modes_of_the_umask(room: Path) -> None:
    """Under umask 027 every file is readable by the group and by nobody else."""
    for path in (room / "done").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_run_prints_dense_against_pruned(room: Path) -> None:
    """The terminal gets a table and the places of the results."""
    printed = (room / "printed.txt").read_text()
    for word in ("parameters", "perplexity", "of dense", str(room / "done" / "model"), "report.html"):
        assert word in printed


def test_result_is_an_ordinary_checkpoint(room: Path) -> None:
    """Plain transformers load it, with the sizes that the plan said."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(room / "done" / "model")
    plan = json.loads((room / "done" / "plan.json").read_text())
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (LAYERS - 2, 64)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan["pruned"]["parameters"]


def test_second_run_reuses_everything(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command again loads no weights, touches no product and reports the same figures."""
    folder = copy_of_done(room, tmp_path)
    before, model = report_in(folder), states(folder / "model")
    monkeypatch.setattr("llmprune.pipeline.inputs.load_model", lambda source: pytest.fail("weights are not needed"))
    assert command("run", room / "recipe.yaml", "--output", folder).code == 0
    assert reused(folder) == dict.fromkeys(STEPS, True)
    assert states(folder / "model") == model
    changing = ("created", "steps", "files")
    after = report_in(folder)
    assert {k: v for k, v in after.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }
    assert [step["seconds"] for step in after["steps"]] == [step["seconds"] for step in before["steps"]]


def test_fresh_starts_over(room: Path, tmp_path: Path) -> None:
    """``--fresh`` makes every product anew, the same, and leaves a user's own file alone."""
    folder = copy_of_done(room, tmp_path)
    (folder / "notes.txt").write_text("mine")
    (folder / "dense.partial").mkdir()  # what a killed run leaves
    before = states(folder / "model")
    assert command("run", room / "recipe.yaml", "--output", folder, "--fresh").code == 0
    assert set(reused(folder).values()) == {False}
    assert states(folder / "model") == before
    assert {path.name for path in folder.iterdir()} == PRODUCTS | {"notes.txt"}


def test_other_code_makes_everything_anew(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another version of llmprune made is not taken for this one's."""
    folder = copy_of_done(room, tmp_path)
    monkeypatch.setattr("llmprune.pipeline.inputs.code_fingerprint", lambda: "another")
    assert command("run", room / "recipe.yaml", "--output", folder).code == 0
    assert set(reused(folder).values()) == {False}


def test_another_evaluation_redoes_only_the_evaluation(room: Path, tmp_path: Path) -> None:
    """What pruned the model stays when only what is measured changes."""
    folder = copy_of_done(room, tmp_path)
    override = "evaluation.perplexity.samples=2"
    assert command("run", room / "recipe.yaml", "--output", folder, "--set", override).code == 0
    assert reused(folder) == {step: step != "evaluation" for step in STEPS}
    assert report_in(folder)["perplexity"]["tokens"] == 2 * 31
    assert report_in(folder)["overrides"] == [override]


def test_another_width_keeps_the_scores(room: Path, tmp_path: Path) -> None:
    """A new target cuts again from the scores that are there, once the finished model is deleted."""
    folder = copy_of_done(room, tmp_path)
    shutil.rmtree(folder / "model")
    assert command("run", room / "recipe.yaml", "--output", folder, "--set", "width.neurons=32").code == 0
    assert reused(folder) == {step: step == "pass 1" for step in STEPS}
    assert json.loads((folder / "model" / "config.json").read_text())["intermediate_size"] == 32


def test_edited_cut_is_replayed(room: Path, tmp_path: Path) -> None:
    """Other layers in ``cut.json`` are the layers that the model keeps, and the report says so."""
    folder = copy_of_done(room, tmp_path)
    cut = json.loads((folder / "cut.json").read_text())
    keep = [0]
    (folder / "cut.json").write_text(json.dumps(cut | {"keep_layers": keep}))
    assert command("run", room / "recipe.yaml", "--output", folder).code == 0
    report = report_in(folder)
    assert reused(folder) == {step: step == "pass 1" for step in STEPS}
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
def test_cut_edited_wrongly(room: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """An edited cut that cannot be is an error of the input, and the model stays as it was."""
    folder = copy_of_done(room, tmp_path)
    before = states(folder / "model")
    cut = json.loads((folder / "cut.json").read_text())
    (folder / "cut.json").write_text(json.dumps(cut | changes))
    outcome = command("run", room / "recipe.yaml", "--output", folder)
    assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    assert states(folder / "model") == before


@pytest.mark.parametrize("changed", ["model", "text"])
def test_evaluation_follows_what_it_measures(room: Path, tmp_path: Path, changed: str) -> None:
    """Another base model, or another held-out text under the same name, is evaluated anew, also without any cut."""
    text = write_text(tmp_path / "text.txt")
    save_model(tmp_path / "base")
    recipe = write_recipe(
        tmp_path / "copy.yaml",
        tmp_path / "base",
        room / "text.txt",
        depth=None,
        width=None,
        evaluation=evaluation(text),
    )
    assert command("run", recipe, "--output", tmp_path / "out").code == 0
    before = report_in(tmp_path / "out")["perplexity"]
    if changed == "model":
        save_model(tmp_path / "base", seed=1)
    else:
        text.write_text("Other words! " * 100)
    assert command("run", recipe, "--output", tmp_path / "out").code == 0
    assert report_in(tmp_path / "out")["perplexity"] != before


def test_set_overrides_the_recipe(room: Path, tmp_path: Path) -> None:
    """``--set`` changes keys, adds sections, and may be repeated."""
    arguments = ["--set", "depth.remove=1", "--set", "width=null", "--json"]
    plan = json.loads(command("plan", room / "recipe.yaml", *arguments).out)
    assert (plan["keep_layers"], plan["pruned"]["widths"]) == (LAYERS - 1, {"intermediate_size": 96})


def test_default_output_folder(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``--output`` the run goes to ``runs/`` and the recipe's name."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "mine.yaml", room / "base", room / "text.txt", width=None, refit=False)
    assert command("run", recipe).code == 0
    assert (tmp_path / "runs" / "mine" / "model" / "config.json").is_file()


def test_no_cut_at_all_copies_the_model(room: Path, tmp_path: Path) -> None:
    """Without depth and width every tensor of the result equals the original's bit for bit."""
    from safetensors.torch import load_file

    recipe = write_recipe(tmp_path / "copy.yaml", room / "base", room / "text.txt", depth=None, width=None)
    assert command("run", recipe, "--output", tmp_path / "out").code == 0
    original = load_file(room / "base" / "model.safetensors")
    result = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert original.keys() == result.keys()
    assert all(original[name].equal(result[name]) for name in original)


def test_plan_is_for_people_and_machines(room: Path) -> None:
    """``plan`` prints a table; with ``--json`` the same as one JSON object, the one that a run keeps."""
    table = command("plan", room / "recipe.yaml")
    assert table.code == 0
    assert "Layers: 2 go" in table.out
    assert f"{report_in(room / 'done')['dense']['parameters']:,}" in table.out
    plan = json.loads(command("plan", room / "recipe.yaml", "--json").out)
    assert plan == json.loads((room / "done" / "plan.json").read_text())


def test_plan_and_anatomy_need_only_a_config(room: Path, tmp_path: Path) -> None:
    """A folder with nothing but ``config.json`` can be planned and looked at."""
    (tmp_path / "bare").mkdir()
    shutil.copy(room / "base" / "config.json", tmp_path / "bare")
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "bare", room / "text.txt")
    assert json.loads(command("plan", recipe, "--json").out)["dense"]["layers"] == LAYERS
    found = json.loads(command("anatomy", tmp_path / "bare", "--json").out)
    assert found["num_layers"] == LAYERS
    assert found["groups"] == [{"field": "intermediate_size", "width": 96, "refusal": None}]
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {"config.json"}


def test_anatomy_says_what_can_be_cut(room: Path) -> None:
    """``anatomy`` names the layers, the neurons with their proof, and both verdicts."""
    outcome = command("anatomy", f"{room / 'base'}/")
    assert outcome.code == 0
    for said in ("4 × LlamaDecoderLayer", "96 in 4 layers", "intermediate_size", "Depth: can be cut", "Width: can be"):
        assert said in outcome.out


def test_anatomy_says_why_not(tmp_path: Path) -> None:
    """A width that no config field sets is refused with the reason, in the table and in JSON."""
    tiny_config("bloom").save_pretrained(tmp_path)
    assert "Width: cannot be cut: " in command("anatomy", tmp_path).out
    found = json.loads(command("anatomy", tmp_path, "--json").out)
    assert found["depth_refusal"] is None
    assert "no config field sets the width of an MLP" in found["width_refusal"]


def test_evaluation_alone_and_against_the_base(room: Path, tmp_path: Path) -> None:
    """``eval`` prints one model's figures, or two side by side, and writes them where asked."""
    options = ["--tasks", "llmprune_agreement", "--include-path", TASKS, "--limit", "4"]
    model = room / "done" / "model"
    alone = command("eval", model, *options, "--output", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert "llmprune_agreement" in alone.out
    assert json.loads((tmp_path / "alone" / "evaluation.json").read_text())["results"]["tasks"][0]["task"]
    against = command("eval", model, "--against", room / "base", *options, "--output", tmp_path / "two")
    assert against.code == 0, against.err
    assert "retention" in against.out
    written = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert written["tasks"][0]["samples"] == 4
    assert written["settings"]["limit"] == 4


def test_gate_decides_the_exit_code(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that is not met exits with 3, after the report; one that is met with 0, without pruning again."""
    from llmprune.evaluation.lm_eval.results import Sample, TaskResult, TaskResults

    def ask(model: Any, side: str, *, evaluation: Any) -> TaskResults:
        right = 400 if side == "dense" else 200
        samples = tuple(
            Sample(doc_id=n, doc_hash=f"{n}", prompt_hash=f"{n}", value=float(n < right)) for n in range(500)
        )
        task = TaskResult(
            task="llmprune_agreement",
            metric="acc",
            filter="none",
            higher_is_better=True,
            value=right / 500,
            samples=samples,
        )
        return TaskResults(tasks=(task,))

    monkeypatch.setattr("llmprune.evaluation.evaluate.ask", ask)
    asked = {"tasks": ["llmprune_agreement"], "include_path": str(TASKS), "limit": 4}
    recipe = write_recipe(
        tmp_path / "gated.yaml", room / "base", room / "text.txt", evaluation=asked | {"gate": {"min_retention": 0.9}}
    )
    missed = command("run", recipe, "--output", tmp_path / "out")
    assert missed.code == 3
    assert "at least 90.00%" in missed.err
    assert "50.00%" in missed.err
    assert "Gate not passed" in missed.out
    assert report_in(tmp_path / "out")["gate"]["passed"] is False
    assert (tmp_path / "out" / "report.html").is_file()
    for least, code, verdict in ((0.5, 3, "not enough samples"), (0.4, 0, "pass")):
        override = f"evaluation.gate.min_retention={least}"
        outcome = command("run", recipe, "--output", tmp_path / "out", "--set", override)
        assert (outcome.code, report_in(tmp_path / "out")["gate"]["verdict"]) == (code, verdict)
    assert set(reused(tmp_path / "out").values()) == {True}


def test_reevaluate_asks_more_samples_and_prunes_nothing(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undecided gate names the command, which continues the samples and makes report and verdict anew."""
    verify_here(monkeypatch)
    asked = {"tasks": ["llmprune_agreement"], "include_path": str(TASKS), "limit": 4}
    recipe = write_recipe(
        tmp_path / "gated.yaml", room / "base", room / "text.txt", evaluation=asked | {"gate": {"min_retention": 0.9}}
    )
    out = tmp_path / "out"
    first = command("run", recipe, "--output", out)
    assert (first.code, "llmprune reevaluate" in first.err) == (3, True)
    model, before = states(out / "model"), report_in(out)
    with monkeypatch.context() as patched:
        patched.setattr("llmprune.pipeline.run.RunInputs", None)  # a second run would need it
        more = command("reevaluate", out, "--limit", 12)
    assert (more.code in (0, 3), states(out / "model") == model) == (True, True), more.err
    after = report_in(out)
    assert (before["tasks"][0]["samples"], after["tasks"][0]["samples"]) == (4, 12)
    assert after["gate"]["bars"][0]["samples"] == 12
    assert "evaluation.limit=12" in after["overrides"]
    for side in ("dense_tasks", "pruned_tasks"):
        samples = json.loads((out / "evaluation.json").read_text())[side]["tasks"][0]["samples"]
        assert [sample["doc_id"] for sample in samples] == list(range(12))
    fewer = command("run", recipe, "--output", out)
    assert (fewer.code, "add --set evaluation.limit=12" in fewer.err, report_in(out)) == (2, True, after), fewer.err
    refused = command("reevaluate", out, "--limit", 12)
    assert (refused.code, "12 samples a task were asked already" in refused.err) == (2, True)
    for text in ("{", None):
        (out / "evaluation.json").unlink() if text is None else (out / "evaluation.json").write_text(text)
        refused = command("reevaluate", out, "--limit", 14)
        assert (refused.code, "evaluation.json cannot be read" in refused.err) == (2, True)


@pytest.mark.parametrize("limit", [(), ("--limit", 9)])
def test_reevaluate_needs_tasks(limit: tuple[str | int, ...], room: Path) -> None:
    """Of a run that evaluated none it says so, and not that every document was asked."""
    refused = command("reevaluate", room / "done", *map(str, limit))
    assert (refused.code, "evaluated no task" in refused.err) == (2, True), refused.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["frobnicate"], 2, "No such command"),
        (["plan"], 2, "RECIPE"),
        (["plan", "nowhere.yaml"], 2, "nowhere.yaml: the recipe cannot be read"),
        (["plan", "."], 2, "Is a directory"),
        (["run", "recipe.yaml", "--set", "depth"], 2, "section.key=value"),
        (["run", "recipe.yaml", "--set", "depht.remove=1"], 2, "did you mean 'depth'"),
        (["eval", "base"], 2, "--tasks"),
        (["eval", "base", "--tasks", " , "], 2, "--tasks"),
        (["eval", "base", "--tasks", "a", "--limit", "0"], 2, "--limit"),
        (["eval", "base", "--tasks", "a", "--include-path", "nowhere"], 2, "nowhere is not a folder"),
        (["eval", "", "--tasks", "a"], 2, "id: must be text of at least 1 character"),
        (["eval", "base", "--tasks", "a", "--output", "text.txt"], 2, "text.txt is a file"),
        (["anatomy", ""], 2, "id: must be text of at least 1 character"),
        (["anatomy", "text.txt"], 2, "text.txt is a file"),
        (["anatomy", "./nowhere"], 2, "does not exist"),
        (["anatomy", "."], 2, "has no config.json"),
        (["anatomy", "package://nowhere/x.gguf"], 2, "no package 'nowhere' is installed"),
    ],
)
def test_wrong_arguments(
    room: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    """A wrong argument is one clear message on stderr and nothing on stdout."""
    monkeypatch.chdir(room)
    outcome = command(*arguments)
    assert (outcome.code, said in outcome.err) == (code, True), outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err


def test_no_arguments_show_the_help() -> None:
    """``llmprune`` alone and ``--help`` list the verbs."""
    verbs = ("plan", "run", "eval", "bench", "report", "compare", "anatomy")
    for arguments in ([], ["--help"]):
        outcome = command(*arguments)
        assert all(verb in outcome.out + outcome.err for verb in verbs)
    assert command("--help").code == 0


def test_version() -> None:
    """``--version`` prints name and version."""
    from llmprune import __version__

    assert command("--version").out == f"llmprune {__version__}\n"


def test_report_is_built_again(room: Path, tmp_path: Path) -> None:
    """``report`` writes the page from report.json, the same as the run did, and prints the table."""
    folder = copy_of_done(room, tmp_path)
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    outcome = command("report", folder)
    assert outcome.code == 0, outcome.err
    assert (folder / "report.html").read_text() == page
    assert "perplexity" in outcome.out
    assert command("report", folder / "report.json", "--output", tmp_path / "elsewhere.html").code == 0
    assert (tmp_path / "elsewhere.html").read_text() == page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "the run is not finished: run it again"),
        ("{", "cannot be read"),
        ("[]", "has schema None"),
        ('{"schema_version": 1}', "has schema 1, and this version of llmprune reads 3"),
        ('{"schema_version": 3, "created": 3}', "fields are wrong"),
    ],
)
def test_report_that_cannot_be_read(room: Path, tmp_path: Path, text: str | None, said: str) -> None:
    """A run that is not finished, a damaged report and another schema are errors of the input, with the remedy."""
    folder = copy_of_done(room, tmp_path)
    (folder / "report.json").unlink()
    if text is not None:
        (folder / "report.json").write_text(text)
    for verb in ("report", "compare"):
        outcome = command(verb, folder)
        assert (outcome.code, said in outcome.err) == (2, True), outcome.err


def test_runs_are_compared(room: Path, tmp_path: Path) -> None:
    """``compare`` prints a row a run, writes a page and JSON, and says what is not measured alike."""
    again = copy_of_done(room, tmp_path)
    assert command("run", room / "recipe.yaml", "--output", again, "--set", "evaluation.perplexity.samples=2").code == 0
    outcome = command("compare", room / "done", again, "--output", tmp_path / "compare.html")
    assert outcome.code == 0, outcome.err
    assert "done" in outcome.out
    assert "again" in outcome.out
    assert "evaluated with different settings" in outcome.out.replace("\n", " ")
    assert "2 runs compared" in (tmp_path / "compare.html").read_text()
    found = json.loads(command("compare", room / "done", again, "--json").out)
    assert [row["run"] for row in found] == ["done", "again"]
    assert found[0]["size"] == pytest.approx(report_in(again)["pruned"]["bytes"] / report_in(again)["dense"]["bytes"])
    twice = command("compare", room / "done", room / "done")
    assert (twice.code, "named twice" in twice.err) == (2, True)


def test_compare_leaves_out_what_is_no_finished_run(room: Path, tmp_path: Path) -> None:
    """``compare runs/*`` names a service's folder, an unfinished run and a file, and compares the rest."""
    first, unfinished, service, stray = (tmp_path / name for name in ("first", "unfinished", "service", "notes.txt"))
    shutil.copytree(room / "done", first)
    for folder in (unfinished, service):
        folder.mkdir()
    shutil.copy(first / "run.json", unfinished)
    stray.write_text("notes")
    outcome = command("compare", room / "done", first, unfinished, service, stray, "--json")
    assert outcome.code == 0, outcome.err
    assert [row["run"] for row in json.loads(outcome.out)] == ["done", "first"]
    assert f"left out: {unfinished} has no report.json; the run is not finished" in outcome.err
    assert f"left out: {service} has no report.json; give the folder of a run" in outcome.err
    assert f"left out: {stray} cannot be read" in outcome.err
    alone = command("compare", first, service)
    assert (alone.code, "of 2 folders 1 is a finished run" in alone.err, str(service) in alone.err) == (2, True, True)
    nowhere = command("compare", room / "done", first, tmp_path / "nowhere")
    assert (nowhere.code, "does not exist" in nowhere.err) == (2, True)


@pytest.mark.parametrize(
    ("verb", "option"), [("compare", "--output"), ("report", "--output"), ("bench", "--output"), ("push", "--save")]
)
def test_an_output_that_cannot_be_written(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, option: str
) -> None:
    """A folder in a file's place, or a file in its folder's, is refused before anything is done; nothing is left."""
    monkeypatch.setattr("llmprune.publish.push.push_run", lambda *_: pytest.fail("pushed"))
    run = room / "done" / "model" if verb == "bench" else room / "done"
    base = ["--against", room / "base"] if verb == "bench" else []
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for place, said in (
        ("folder", "is a folder; give a file, such as"),
        ("file/x.json", "its folder cannot be created"),
    ):
        outcome = command(verb, run, *base, option, tmp_path / place)
        assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_an_output_in_a_new_folder(room: Path, tmp_path: Path) -> None:
    """The folder of an output file is made."""
    assert command("compare", room / "done", "-o", tmp_path / "new" / "page.html").code == 0
    assert (tmp_path / "new" / "page.html").is_file()


def test_a_write_that_fails_leaves_no_partial_file(tmp_path: Path) -> None:
    """The file beside goes, and only a full disk gets the advice to make room."""
    from llmprune.common.errors import DiskError
    from llmprune.common.files import write_text as write

    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(DiskError, match=r"choose another --output$"):
        write(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_bench_prints_and_writes(room: Path, tmp_path: Path) -> None:
    """``bench`` says sizes, times and the estimate for what it is, and writes the same as JSON."""
    options = ["--batch-sizes", "1", "--contexts", "8", "--new-tokens", "4", "--repeats", "1"]
    output = tmp_path / "new" / "bench.json"
    outcome = command("bench", room / "done" / "model", "--against", room / "base", *options, "--output", output)
    assert outcome.code == 0, outcome.err
    for said in ("first token", "decode/s", "weights on disk", "(estimate)", "640 pJ"):
        assert said in outcome.out
    found = json.loads(output.read_text())
    assert found["model_size"]["disk"] == (room / "done" / "model" / "model.safetensors").stat().st_size
    assert found["model_size"]["joules"] < found["base_size"]["joules"]
    assert found["points"][0]["context"] == 8


def test_evaluation_has_a_gate_and_continues(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``eval --min-retention`` exits with 3 where the interval does not clear it; again, no weights are read."""
    options = ["--tasks", "llmprune_agreement", "--include-path", TASKS, "--limit", "4", "--output", tmp_path / "out"]
    model = room / "done" / "model"
    arguments = ["eval", model, "--against", room / "base", *options]
    first = command(*arguments, "--min-retention", "0.99")
    assert first.code == 3, first.err
    assert "--limit" in first.err or "prune less" in first.err
    monkeypatch.setattr("llmprune.cli.eval.load_model", lambda source: pytest.fail("weights are not needed"))
    again = command(*arguments, "--min-retention", "0.01")
    assert again.code == 0, again.err
    same = command("eval", room / "base", "--against", room / "base", *options[:-2], "--min-retention", "1")
    assert same.code == 0, same.err
