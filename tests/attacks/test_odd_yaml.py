"""YAML whose tags, numbers and escapes fit no value: a sentence for each, and one reading for all answers of a form."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from helpers.service import RECIPE, YAML, ServiceHarness

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.yaml_reader import dump, read_value
from llmprune.service.recipe_policy.policy import admit
from llmprune.service.recipe_policy.yaml_limits import RECIPE_LIMIT
from llmprune.service.settings import Settings
from llmprune.service.web.new_job.first_recipe import START
from llmprune.service.web.new_job.form import RecipeForm, apply_form, form_of

TAGS = (
    *("int", "float", "bool", "timestamp", "binary", "set", "omap", "pairs"),
    *("seq", "map", "null", "str", "merge", "value", "yaml", "python/tuple"),
)
WRONG = (
    *("", "''", "x", "-", "+", ".", "~", "<<", "=", "0xff", "1:2", "1e9999", ".inf", "2024-01-01", "2024-99-99"),
    *("[]", "[a]", "[[a]]", "{}", "{a: b}", "{a: }", "[{a: b}]", "? ", "{? [a] : b}", "|\n  3\n", "&a x", "!x y"),
    *('"\\ud800"', '"\\ud83d\\ude00"', '"\\UFFFFFFFF"', '"\\U00110000"', '"\\0"'),
)
HUGE = ("9" * 5_000, "0x" + "f" * 5_000, "1:" * 3_000 + "1", "1" * 5_000 + ".0")
FRAGMENTS = (
    *("!!", "!", "!<", "&a", "*a", "%YAML 1.1\n", "%TAG ! x\n", "---", "...", "|", "|-\n", ">", "? ", ": ", "- "),
    *(
        "[",
        "]",
        "{",
        "}",
        ",",
        "#",
        "\n",
        "  ",
        "\t",
        '"',
        "'",
        "\\u",
        "\\U0011",
        "\\x",
        "\\ud800",
        "%41",
        "%ff",
        "int",
    ),
    *("<<: ", "a", "1", "\x85", "\u2028", "\ufeff", "\r", "~", "0x", "1" * 50, "@", "`", "é", "\U0001f600"),
)
EVERY = {name: "7" for name in RecipeForm.model_fields if name not in ("refit", "source")}


def put_to_all_readers(text: str) -> None:
    """Read a text as a recipe, as an override's value and by the form: each reads it or raises RecipeError."""
    for read in (
        lambda: admit(text, (), settings=Settings(data_dir=Path())),
        lambda: Recipe.parse(RECIPE, (f"depth.remove={text}",)),
        lambda: apply_form(text, (form_of(text) or RecipeForm()).model_copy(update=EVERY)),
    ):
        with suppress(RecipeError):
            read()


@pytest.mark.parametrize("tag", TAGS)
def test_no_tag_is_more_than_a_wrong_value(tag: str) -> None:
    """Empty, wrong and huge values under every tag of YAML."""
    for value in (*WRONG, *HUGE):
        put_to_all_readers(f"model: !!{tag} {value}")
        put_to_all_readers(f"!!{tag} {value}")
        put_to_all_readers(f"!!{tag} {value}: 1")


def test_no_text_is_more_than_a_wrong_recipe() -> None:
    """Pieces of YAML's syntax in any order, and a recipe that they were put into."""
    chance = random.Random(0)
    for _ in range(200):
        text = "".join(chance.choices(FRAGMENTS, k=chance.randint(1, 12)))
        put_to_all_readers(text)
        place = chance.randrange(len(START))
        put_to_all_readers(START[:place] + text + START[place:])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "!!float ''",
            "line 1, column 1: not valid YAML: '' does not fit its tag !!float; correct it or remove the tag",
        ),
        ("a: !!bool x", "line 1, column 4: not valid YAML: 'x' does not fit its tag !!bool"),
        ("!!timestamp ''", "the tag '!!timestamp' is not supported on a value of a recipe; leave it out"),
        ("!!set {a}", "the tag '!!set' is not supported on a mapping of a recipe"),
        ("!!int [1]", "the tag '!!int' is not supported on a list of a recipe"),
        ("!mine x", "the tag '!mine' is not supported on a value"),
        ('"\\ud800"', "halves of a character; write the whole character"),
        ('"\\UFFFFFFFF"', "is above \\U0010FFFF"),
        ("%YAML 1." + "9" * 5_000 + "\n--- a", "the version after %YAML is too long"),
        ("9" * 5_000, "a whole number of 5,000 digits; at most 100 are read"),
    ],
)
def test_what_is_said_of_odd_values(text: str, said: str) -> None:
    """A tag, an escape or a number that is not read is named with its place."""
    with pytest.raises(RecipeError) as refused:
        read_value(text)
    assert said in str(refused.value)


def test_tags_that_fit_are_read() -> None:
    """The tags of YAML's plain values stay what they are."""
    text = "{a: !!str 1, b: !!int 010, c: !!float 1, d: !!bool true, e: !!null '', f: !!seq [], g: !!map {}}"
    assert read_value(text) == {"a": "1", "b": 10, "c": 1.0, "d": True, "e": None, "f": [], "g": {}}


@pytest.mark.parametrize("text", ["1e-3", "0o7", "yes", "2024-07-01", "1:30", "010", "~", "é", "<<"])
def test_text_that_looks_like_a_value_stays_text(text: str) -> None:
    """What the form and the JSON interface write is read again as it was."""
    assert read_value(dump({"a": [text]})) == {"a": [text]}


def test_an_index_of_thousands_of_digits_is_no_place() -> None:
    """An override's key is a number as well."""
    with pytest.raises(RecipeError, match="is not an index of a list of 1"):
        Recipe.parse(RECIPE + "evaluation: {tasks: [a]}", (f"evaluation.tasks.{'1' * 5_000}=b",))


ODD = {
    "empty float": "model: !!float ''\n",
    "wrong bool": "model: !!bool x\n",
    "empty timestamp": "model: !!timestamp ''\n",
    "empty int": "model: !!int ''\n",
    "int of a list": "model: !!int [1]\n",
    "half a character": 'model: {id: "\\ud800"}\n',
    "escape above all": 'model: {id: "\\UFFFFFFFF"}\n',
    "hexadecimal": f"calibration: {{samples: 0x{'f' * (RECIPE_LIMIT - 40)}}}\n",
    "base 60": f"calibration: {{samples: {'1:' * (RECIPE_LIMIT // 2 - 20)}1}}\n",
    "digits": f"calibration: {{samples: {'9' * (RECIPE_LIMIT - 40)}}}\n",
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service."""
    return ServiceHarness(tmp_path_factory.mktemp("odd"), rate=1e9, burst=10**9)


@pytest.mark.parametrize("text", ODD.values(), ids=list(ODD))
def test_no_recipe_is_an_error_of_the_service(harness: ServiceHarness, text: str) -> None:
    """The API and every page with a recipe answer odd YAML as any other wrong recipe."""
    checked = harness.http.post("/v1/recipes/validate", content=text, headers=YAML)
    assert (checked.status_code, checked.json()["valid"]) == (200, False)
    assert harness.http.post("/v1/jobs", content=text, headers=YAML).status_code == 422
    override = {"set": f"model={text.partition(': ')[2][:2_000]}"}
    assert harness.http.post("/v1/jobs", content=RECIPE, headers=YAML, params=override).status_code == 422
    assert harness.http.post("/submit/check?typed=true", data={"recipe": text}).status_code == 200
    assert harness.http.post("/submit", data={"recipe": text}).status_code == 422
    assert harness.http.post("/submit/compose", data={"recipe": text, "model": "a/b"}).status_code in (200, 422)


def test_a_form_reads_a_recipe_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many answers are changed, the text is read, checked and the outcome read, and no more."""
    text = START + "more:\n" + "".join(f"  k{n}: 1\n" for n in range(200))
    fetched: list[int] = []
    fetch = yaml.scanner.Scanner.fetch_more_tokens

    def counted(scanner: yaml.scanner.Scanner) -> object:
        fetched.append(1)
        return fetch(scanner)

    monkeypatch.setattr(yaml.scanner.Scanner, "fetch_more_tokens", counted)
    read_value(text)
    once = len(fetched)
    fetched.clear()
    apply_form(text, RecipeForm(**EVERY))
    assert len(fetched) < 3.5 * once


def test_many_answers_at_once_keep_the_comments() -> None:
    """Values of other lengths are put in at their own places, in whatever order the text has them."""
    text = (
        "# all\nwidth: {mlp: 0.5}  # w\ndepth: {remove: 10}  # d\nmodel: {dtype: float32, id: a/b}  # m\n"
        "calibration:\n  samples: !!int 4  # s\n  dataset: &name 'x'  # x\n"
    )
    answers = {
        "width": "0.125",
        "layers": "3",
        "model": "org/longer",
        "dtype": "bfloat16",
        "samples": "1000",
        "dataset": "y",
    }
    form = form_of(text)
    assert form is not None
    assert apply_form(text, form.model_copy(update=answers)) == (
        "# all\nwidth: {mlp: 0.125}  # w\ndepth: {remove: 3}  # d\nmodel: {dtype: bfloat16, id: org/longer}  # m\n"
        "calibration:\n  samples: 1000  # s\n  dataset: y  # x\n"
    )
