"""Values of a recipe: YAML scalars, overrides, its text, its fingerprints, and the recipes that ship."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.recipes import BASE, MODEL, problems, table, with_section
from pydantic import ValidationError

from llmprune.common.errors import RecipeError
from llmprune.recipe.evaluation import Evaluation
from llmprune.recipe.recipe import Recipe, validate_arguments
from llmprune.recipe.recover import SelfGenerated

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_ready_recipes_are_valid(path: Path) -> None:
    """Every recipe that the project ships is valid and cuts something."""
    recipe = Recipe.load(path)
    assert recipe.depth or recipe.width or recipe.budget
    assert recipe.text == path.read_text(encoding="utf-8")


def test_the_promised_recipes_are_there() -> None:
    """There are recipes for a small, a medium and a large model, and for the quickstart."""
    names = {"quickstart", "smollm2-135m", "llama-3.1-8b", "qwen3-8b", "llama-2-70b-mlperf"}
    assert names <= {path.stem for path in RECIPES}


def test_quickstart_keeps_its_texts_apart() -> None:
    """The quickstart measures perplexity on kinds of text that calibration does not use."""
    recipe = Recipe.load(next(path for path in RECIPES if path.stem == "quickstart"))
    assert recipe.evaluation.perplexity is not None
    sections = (recipe.calibration, recipe.evaluation.perplexity)
    calibrated, held_out = ({source.dataset for source in section.text_sources()} for section in sections)
    assert len(calibrated) > 1
    assert not calibrated & held_out


def test_a_name_that_no_path_can_have() -> None:
    """It is refused before a file of that name is looked for, which the system answers with an error."""
    (said,) = problems(f"model: {{id: {'x' * 256}}}")
    assert said.startswith("model.id: a path has at most 4095 bytes, and 255 between two slashes; shorten it")
    assert Recipe.parse(f"model: {{id: org/{'x' * 255}}}").model.id.startswith("org/")


def test_anchors_and_merge_keys() -> None:
    """A section may repeat another one by YAML merge keys, and its own keys take precedence."""
    recipe = Recipe.parse(
        MODEL + "calibration: &text {dataset: a/b, samples: 4}\n"
        "evaluation: {perplexity: {<<: *text, samples: 8, split: test}}"
    )
    assert recipe.evaluation.perplexity is not None
    assert (recipe.evaluation.perplexity.dataset, recipe.evaluation.perplexity.samples) == ("a/b", 8)
    assert recipe.calibration.samples == 4


@pytest.mark.parametrize(("given", "windows"), [("24", 24), ("0", 0), ("false", 0), ("auto", 6)])
def test_self_generated_windows_have_the_same_forms_in_both_sections(given: str, windows: int) -> None:
    """A number, 0 or false for none, and auto; recover's settings with that number are the same recipe."""
    section = f"{{self_generated: {given}, sequence_length: 128}}"
    text = MODEL + f"recover: {{tokens: 1K, batch_tokens: 128, data: {section}}}\ncalibration: "
    recipe = Recipe.parse(text + f"{{samples: 24, self_generated: {given}}}")
    assert recipe.recover is not None
    assert (recipe.calibration.generated, recipe.recover.generated(128)) == (windows, windows)
    if windows == 24:
        assert recipe.recover.data.self_generated == SelfGenerated(samples=24)


def test_yaml_values_mean_what_they_say() -> None:
    """Numbers with exponents are numbers, 010 is ten, and a date or a yes is text."""
    recipe = Recipe.parse(
        "model: {id: yes, revision: 2024-07-01}\ncalibration: {dataset: x, samples: 010}\nrefit: {ridge: 1e-3}"
    )
    assert recipe.refit is not None
    assert (recipe.model.id, recipe.model.revision) == ("yes", "2024-07-01")
    assert (recipe.calibration.samples, recipe.refit.ridge) == (10, 0.001)


def test_left_out_and_switched_off() -> None:
    """Missing sections have their defaults; null means no cut, and refit: false no refit."""
    recipe = Recipe.parse(BASE)
    assert recipe.depth is None
    assert recipe.width is None
    assert recipe.refit is not None
    assert Recipe.parse(BASE + "depth: null\nrefit: false").refit is None


GOOD_OVERRIDES = table(r"""
depth.remove=6
    depth.remove == 6
 depth.remove = 6
    depth.remove == 6
depth=null
    depth is None
width.mlp=0.5
    width.mlp == 0.5
refit=false
    refit is None
refit.ridge=1e-2
    refit.ridge == 0.01
model.id=a=b
    model.id == "a=b"
model.max_memory.0=2GB
    model.max_memory == {0: 2_000_000_000}
model.max_memory={cpu: 1GB}
    model.max_memory == {"cpu": 1_000_000_000}
evaluation.tasks.1=c
    evaluation.tasks == ("a", "c")
evaluation.tasks=[d]
    evaluation.tasks == ("d",)
evaluation.perplexity.samples=8
    (calibration.samples, evaluation.perplexity.samples) == (4, 8)
""")

BAD_OVERRIDES = table(r"""
depth
    --set 'depth': the form is section.key=value, such as width.mlp=0.5
=3
    --set '=3': the form is section.key=value
depth..remove=3
    --set 'depth..remove=3': the form is section.key=value
depth.remove=[
    --set 'depth.remove=[': line 1, column 2: not valid YAML
depth={remove: 1, remove: 2}
    --set 'depth={remove: 1, remove: 2}': line 1: 'remove' is given twice
model.id.x=3
    --set 'model.id.x=3': model.id is 'org/model', which has no keys; set it as a whole
evaluation.tasks.9=c
    --set 'evaluation.tasks.9=c': '9' is not an index of a list of 2; count from 0
dept.remove=3
    dept: unknown key; did you mean 'depth'?
depth.remove="6"
    depth.remove: must be a whole number, not '6'; remove the quotes
depth.keep=6
    depth: needs exactly one of remove, keep, layers; remove and keep given: leave one out or set it to null
model.id=
    model.id: must be text, not null
""")

OVERRIDABLE = (
    "model: {id: org/model, max_memory: {0: 1GB}}\ncalibration: &text {dataset: a/b, samples: 4}\n"
    "depth: {remove: 3}\nevaluation: {tasks: [a, b], perplexity: *text}\n"
)


@pytest.mark.parametrize(("override", "holds"), GOOD_OVERRIDES)
def test_overrides(override: str, holds: str) -> None:
    """``--set`` changes one value only, and the user's text is unchanged."""
    recipe = Recipe.parse(OVERRIDABLE, [override])
    assert eval(holds, {name: getattr(recipe, name) for name in Recipe.model_fields})
    assert (recipe.text, recipe.overrides) == (OVERRIDABLE, (override,))


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES)
def test_bad_overrides(override: str, message: str) -> None:
    """A ``--set`` that cannot be parsed or applied is quoted with the reason."""
    assert [problem[: len(message)] for problem in problems(OVERRIDABLE, [override])] == [message]


def test_text_is_verbatim(tmp_path: Path) -> None:
    """Comments, order, line endings and the byte order mark of the user's file are preserved."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf# mine\r\n" + BASE.replace("\n", "\r\n").encode() + b"# caf\xc3\xa9\n\n")
    assert Recipe.load(path).text.encode() == path.read_bytes()


def test_a_recipe_made_in_python_has_a_text() -> None:
    """A recipe made in Python is written as YAML that parses to an equal recipe."""
    made = Recipe.model_validate(
        {"model": {"id": "1e5", "revision": "no"}, "calibration": {"dataset": "x"}, "refit": False}
    )
    assert Recipe.parse(made.text).model_dump() == made.model_dump()


def test_fingerprint_follows_the_named_sections() -> None:
    """A fingerprint depends on the values of its sections only."""
    plain = Recipe.parse(BASE)
    spelled = Recipe.parse("# the default, written out\n" + BASE + "refit: {}\nwidth: {mlp: 0.5}")
    assert plain.fingerprint(["model", "refit"]) == spelled.fingerprint(["refit", "model"])
    assert plain.fingerprint(["width"]) != spelled.fingerprint(["width"])
    changed = Recipe.parse(BASE, ["calibration.seed=1"])
    assert plain.fingerprint(["calibration"]) != changed.fingerprint(["calibration"])
    with pytest.raises(AssertionError, match="not sections"):
        plain.fingerprint(["modle"])


@pytest.mark.parametrize("place", ["", "model", "calibration", "evaluation"])
def test_recipes_are_frozen(place: str) -> None:
    """No value of a recipe can be changed."""
    section = getattr(Recipe.parse(BASE), place) if place else Recipe.parse(BASE)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, next(iter(type(section).model_fields)), None)


def test_arguments_are_as_strict_as_recipes() -> None:
    """Command-line arguments for a section are checked with the messages of the recipe."""
    assert validate_arguments(Evaluation, {"tasks": ("a",), "limit": 3}).tasks == ("a",)
    with pytest.raises(RecipeError, match=r"^arguments: 2 problems\n  - tasks.1: must be text.*\n  - limit: must"):
        validate_arguments(Evaluation, {"tasks": ("a", 3), "limit": 0})


def test_reading_recipes_imports_nothing_heavy() -> None:
    """Reading a recipe imports neither torch nor transformers, datasets or numpy."""
    heavy = {"torch", "transformers", "datasets", "numpy"}
    code = f"import sys, llmprune.recipe.recipe; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


ADDRESSES = table(r"""
model: {id: 'https://huggingface.co/org/model'}
    model.id: an address is no name; write the hub id org/model (given:
model: {id: 'https://huggingface.co/org/model/tree/v2?x=1'}
    model.id: an address is no name; write the hub id org/model, with the revision v2 (given:
calibration: {dataset: 'hf://datasets/allenai/c4/en/a.json'}
    calibration.dataset: an address is no name; write the hub id allenai/c4 (given:
calibration: {sources: [{dataset: 'https://example.com/a.txt'}]}
    calibration.sources.0.dataset: nothing is read from an address; download it
evaluation: {against: 'https://hf.co/org/model/'}
    evaluation.against: an address is no name; write the hub id org/model (given:
""")


@pytest.mark.parametrize(("section", "message"), ADDRESSES)
def test_addresses_are_no_names(section: str, message: str) -> None:
    """The address of a page on the hub is answered with the hub id in it, any other with what to name instead."""
    found = problems(with_section(section))
    assert found[0].startswith(message), found
