"""The plan reports everything that a run refuses before it reads weights, at once, each problem with its key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import command, save_model, write_text
from helpers.service import YAML, ServiceHarness
from safetensors.torch import save_file

from llmprune.common.errors import LLMPruneError, RecipeError
from llmprune.planning.checks import ErrorCollector, _placed, checks_of
from llmprune.planning.plan import make_plan, plan_and_check
from llmprune.planning.texts.text_inputs import TextInputs
from llmprune.recipe.recipe import Recipe
from llmprune.service.planner import worker as plan_worker

Change = Callable[[dict[str, Any], Path], None]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with ``base`` (a model of 64 positions), ``mute`` (without tokenizer), texts and ready tokens."""
    folder = tmp_path_factory.mktemp("checks")
    save_model(folder / "base", max_position_embeddings=64)
    save_model(folder / "mute", tokenizer=False, max_position_embeddings=64)
    write_text(folder / "text.txt")
    (folder / "empty.txt").touch()
    (folder / "notes.pdf").write_text("text")
    save_file({"ids": torch.full((4, 32), 300), "ok": torch.ones(4, 32, dtype=torch.int64)}, folder / "ids.safetensors")
    return folder


LONG_ANSWERS = {"prompts": "held_out", "samples": 2, "prompt_tokens": 30, "new_tokens": 8}


def recipe_in(shared: Path, change: Change) -> Recipe:
    """Return a valid recipe, changed by ``change``."""
    text = {"dataset": str(shared / "text.txt"), "samples": 4, "sequence_length": 32}
    data = {"model": {"id": str(shared / "base")}, "calibration": dict(text), "depth": {"remove": 1}}
    data |= {"evaluation": {"perplexity": dict(text)}}
    change(data, shared)
    return Recipe.parse(yaml.safe_dump(data))


def test_a_recipe_that_can_be_run_passes(shared: Path) -> None:
    """Every check passes, and the texts that the checks read are stored for the run."""
    found = plan_and_check(recipe_in(shared, lambda *_: None))
    found.require()
    assert "calibration_text" in vars(found.texts)
    assert "held_out_text" in vars(found.texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, _: data["calibration"].pop("sequence_length"),
         "calibration.sequence_length: windows of 2048 tokens are longer than the model's 64 positions"),
        (lambda data, _: data["evaluation"]["perplexity"].update(sequence_length=65),
         "evaluation.perplexity.sequence_length: windows of 65 tokens are longer"),
        (lambda data, shared: data["calibration"].update(dataset=str(shared / "gone.txt")),
         "calibration: the data file .*gone.txt does not exist"),
        (lambda data, shared: data["evaluation"]["perplexity"].update(dataset=str(shared / "empty.txt")),
         "evaluation.perplexity: the data file .*empty.txt is empty"),
        (lambda data, shared: data["calibration"].update(dataset=str(shared / "notes.pdf")), "notes.pdf is of a kind"),
        (lambda data, _: data["calibration"].update(dataset="package://pydoc_data.topics/gone"), "calibration: .*gone"),
        (lambda data, _: data["calibration"].update(samples=10_000), "calibration: .* need 320,000"),
        (lambda data, _: data["calibration"].update(text_field="body"), "calibration: .* has no column 'body'"),
        (lambda data, _: data["calibration"].update(bos=True), r"calibration\.bos: the tokenizer has no begin-of-text"),
        (lambda data, shared: data["evaluation"].update(
            perplexity={"tokens": str(shared / "ids.safetensors"), "key": "ok", "bos": True}),
         r"evaluation\.perplexity\.bos: the tokenizer has no begin-of-text"),
        (lambda data, shared: data.update(calibration={"tokens": str(shared / "gone.safetensors"), "key": "x"}),
         "calibration: the tokens file .* does not exist"),
        (lambda data, shared: data.update(calibration={"tokens": str(shared / "ids.safetensors"), "key": "ids"}),
         "calibration: the token ids range from 300 to 300"),
        (lambda data, shared: data.update(calibration={"tokens": str(shared / "ids.safetensors"), "key": "no"}),
         "calibration: .* has no tensor 'no'"),
        (lambda data, shared: data["model"].update(id=str(shared / "mute")), "model: .*mute has no tokenizer"),
        (lambda data, _: data["evaluation"].update(tasks=["llmprune_nonsense"], include_path=TASKS),
         "evaluation.tasks: .*llmprune_nonsense"),
        (lambda data, _: data["evaluation"].update(include_path="/nowhere/at/all"), "evaluation.include_path: "),
        (lambda data, _: data["evaluation"].update(generation=LONG_ANSWERS),
         "evaluation.generation: .*exceed the 32 tokens"),
        (lambda data, shared: data["evaluation"].update(
            perplexity={"tokens": str(shared / "ids.safetensors"), "key": "ok"},
            generation=LONG_ANSWERS), "evaluation.generation: .*exceed the 32"),
        (lambda data, _: data["evaluation"].update(speed={"prompt_tokens": 60, "new_tokens": 8}), "evaluation.speed: "),
        (lambda data, _: data["evaluation"].update(gate={"min_retention": 0.9}), "evaluation.gate: .*no task to judge"),
        (lambda data, _: data["depth"].update(criterion={"kind": "residual", "windows": 8}),
         "depth.criterion.*leaves none to refit"),
    ],
)  # fmt: skip
def test_plan_and_run_refuse_the_same(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, message: str
) -> None:
    """Plan and run raise the same error with its key, and the run makes no folder."""
    from llmprune.evaluation.lm_eval import tasks
    from llmprune.pipeline.run import run

    own = tasks.manager_of(Path(TASKS))  # lm-eval's full index takes seconds
    monkeypatch.setattr(tasks, "_all_tasks", lambda folder: own)
    recipe = recipe_in(shared, change)
    with pytest.raises(LLMPruneError, match=message) as planned:
        make_plan(recipe)
    with pytest.raises(type(planned.value)) as refused:
        run(recipe, tmp_path / "out")
    assert str(refused.value) == str(planned.value)
    assert not (tmp_path / "out").exists()


TASKS = str(Path(__file__).parents[2] / "eval" / "tasks")


def test_one_round_lists_everything(shared: Path, tmp_path: Path) -> None:
    """Wrong keys, an impossible depth, missing files, long windows, no tokenizer: each is reported once, by its key."""
    recipe = tmp_path / "recipe.yaml"
    sections = {
        "model": {"id": str(shared / "mute")},
        "calibration": {"dataset": "gone.txt", "sequence_length": 4096, "samples": "many"},
        "depth": {"remove": 9},
        "width": {"mpl": 0.5},
        "evaluation": {"perplexity": {"dataset": "lost.txt"}, "speed": {"new_tokens": 0}},
    }
    recipe.write_text(yaml.safe_dump(sections))
    expected = (
        "width.mpl: unknown key", "calibration.samples: must be", "evaluation.speed.new_tokens: must be",
        "depth.remove: ", "remove at most 3", "has no tokenizer", "gone.txt does not exist", "lost.txt does not exist",
        "calibration.sequence_length: windows of 4096", "evaluation.perplexity.sequence_length: windows of 2048",
    )  # fmt: skip
    for verb in (["plan", recipe], ["run", recipe, "--output", tmp_path / "out"]):
        outcome = command(*verb)
        assert outcome.code == 2
        missing = [message for message in expected if message not in outcome.err]
        assert not missing, outcome.err
        assert outcome.err.count("samples") == 1  # no check that depends on the wrong key has run


def test_a_model_of_the_wrong_kind_hides_no_other_problem(shared: Path, tmp_path: Path) -> None:
    """Problems that the config alone shows are listed too, each once."""
    base = Path(shutil.copytree(shared / "mute", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (base / "config.json").write_text(json.dumps(config))
    found = plan_and_check(recipe_in(shared, lambda data, _: (
        data["model"].update(id=str(base)), data["calibration"].update(sequence_length=65)
    )))  # fmt: skip
    listed = sorted(found.errors.listed())
    assert [problem.split(":")[0] for problem in listed] == ["calibration.sequence_length", "model", "model"]
    assert "a classifier's" in listed[1]
    assert "has no tokenizer" in listed[2]


@pytest.mark.parametrize(
    ("message", "placed"),
    [
        ("width.mlp: 0.999 keeps all", "width.mlp: 0.999 keeps all"),
        ("sparsity: no matrix", "sparsity: no matrix"),
        ("depth.criterion residual judges", "depth.criterion residual judges"),
        ("model.safetensors.index.json is no index", "model: model.safetensors.index.json is no index"),
        ("nothing fits", "model: nothing fits"),
    ],
)
def test_a_sentence_gets_its_key_unless_it_starts_with_one(message: str, placed: str) -> None:
    """A file whose name starts like a section is not a key."""
    assert str(_placed("model", LLMPruneError(message))) == placed


def test_a_check_that_depends_on_a_wrong_key_is_skipped(shared: Path) -> None:
    """With a wrong sequence_length, for example, the windows' length is not checked."""
    partial = Recipe.read(
        f"model: {{id: {shared / 'base'}}}\ncalibration: {{dataset: {shared / 'text.txt'}, sequence_length: long}}\n"
    )
    assert (partial.wrong, partial.recipe is None) == (("calibration.sequence_length",), False)
    assert partial.recipe is not None
    found = plan_and_check(partial.recipe, wrong=partial.wrong, problems=partial.problems)
    with pytest.raises(RecipeError) as caught:
        found.require()
    assert len(caught.value.problems) == 1


def test_every_check_names_keys_of_the_recipe(shared: Path) -> None:
    """The keys of all checks exist in the schema: a misspelt one would never match."""
    recipe = recipe_in(
        shared, lambda data, _: data["evaluation"].update(speed={}, generation={}, gate={"min_retention": 0.9})
    )
    for check in checks_of(TextInputs(recipe)):
        for key in (check.place, *check.reads):
            model: Any = Recipe
            for part in key.split("."):
                assert part in model.model_fields, key
                inner = model.model_fields[part].annotation
                model = next(
                    (one for one in (inner, *getattr(inner, "__args__", ())) if hasattr(one, "model_fields")), None
                )


def test_a_single_error_keeps_its_kind() -> None:
    """One error is raised with its own class and its key; several become one RecipeError."""
    errors = ErrorCollector()

    def fail() -> None:
        raise LLMPruneError("is wrong")

    errors.attempt("calibration", ("calibration",), work=fail)
    with pytest.raises(LLMPruneError, match=r"^calibration: is wrong$"):
        errors.raise_all()
    errors.attempt("depth", ("depth",), work=fail)
    with pytest.raises(RecipeError, match="2 problems"):
        errors.raise_all()


class PlannerInProcess:
    """Planner that runs in the test's process."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def plan(self, recipe: str, overrides: Any, *, caller: str, wrong: Any = ()) -> dict[str, Any]:
        """Return the worker's answer."""
        self.asked.append(recipe)
        answer: dict[str, Any] = json.loads(json.dumps(plan_worker._answer(recipe, list(overrides), wrong=list(wrong))))
        return answer


def test_the_service_lists_form_rules_and_plan_together(shared: Path, tmp_path: Path) -> None:
    """Problems of form, service rules and plan come in one answer; the planner gets no part that the rules refuse."""
    planner = PlannerInProcess()
    harness = ServiceHarness(tmp_path, planner, allow_roots=(shared,))  # type: ignore[arg-type]  # what the service uses of it
    sections = {
        "model": {"id": "mute"},
        "calibration": {"dataset": "empty.txt", "sequence_length": 4096},
        "depth": {"remove": 9},
        "width": {"mpl": 0.5},
        "evaluation": {"perplexity": {"dataset": "/etc/hostname.txt"}},
        "hub": {"repo_id": "org/secret"},
    }
    text = yaml.safe_dump(sections)
    answer = harness.http.post("/v1/recipes/plan", content=text, headers=YAML)
    message = "\n".join(answer.json()["problems"])
    assert answer.status_code == 422
    for part in (
        "width.mpl: unknown key", "hub: is not accepted", "hostname.txt' is not allowed", "remove at most 3",
        "has no tokenizer", "empty.txt is empty", "calibration.sequence_length: windows of 4096",
    ):  # fmt: skip
        assert part in message, message
    assert str(shared) not in message
    (asked,) = planner.asked
    assert "hostname" not in asked
    assert "secret" not in asked
    form = {"recipe": text}
    check = harness.http.post("/submit/check", data=form).text
    assert ("things to correct" in check, "/submit/plan" in check, "can be run" in check) == (True, True, False)
    assert "empty.txt is empty" in harness.http.post("/submit/plan", data=form).text
    valid = harness.http.post("/v1/recipes/validate", content=text, headers=YAML).json()
    assert "has no tokenizer" not in str(valid)


def test_the_green_line_comes_with_the_plan(shared: Path, tmp_path: Path) -> None:
    """The page marks a recipe as good only after the plan has checked model, text and tasks."""
    harness = ServiceHarness(tmp_path, PlannerInProcess(), allow_roots=(shared,))  # type: ignore[arg-type]  # what the service uses of it
    text = {"dataset": "text.txt", "samples": 4, "sequence_length": 32}
    good = {"recipe": yaml.safe_dump({"model": {"id": "base"}, "calibration": text})}
    bad = {"recipe": yaml.safe_dump({"model": {"id": "base"}, "calibration": text | {"samples": 10_000}})}
    for form, runs in ((good, True), (bad, False)):
        assert 'class="good"' not in harness.http.post("/submit/check", data=form).text
        assert ('class="good"' in harness.http.post("/submit/plan", data=form).text) == runs
