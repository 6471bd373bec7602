"""Bodies that cost far more than their bytes: the event loop continues, and one caller has one turn."""

from __future__ import annotations

import asyncio
import asyncio.events
import gc
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest
from helpers.service import RECIPE, YAML, ServiceHarness
from pydantic import ValidationError

from llmprune.common.errors import MOST_PROBLEMS, RecipeError
from llmprune.common.hub.secrets import redact
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.text_source import readable_split
from llmprune.recipe.validation_messages import describe_problems
from llmprune.service.api.jobs.recipe_queue import RecipeQueue
from llmprune.service.recipe_policy.policy import admit
from llmprune.service.recipe_policy.yaml_limits import RECIPE_LIMIT
from llmprune.service.settings import Settings
from llmprune.service.web.new_job.first_recipe import START
from llmprune.service.web.new_job.form import RecipeForm

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
LONGEST = 0.05  # seconds of the loop's own processor time for one callback
SIZE = Settings(data_dir=Path()).body_limit - 500


def keys(size: int) -> str:
    """A JSON object of that many bytes, with as many keys as fit."""
    return "{" + ",".join(f'"k{n}":1' for n in range(size // 12)) + "}"


ANSWERS = {name: "7" for name in RecipeForm.model_fields if name != "refit"}
LONG = START + "more:\n" + "".join(f"  k{n}: 1\n" for n in range(2_800))
PART = '--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
BODIES = {
    "JSON of many keys": ("/v1/recipes/validate", keys(RECIPE_LIMIT), JSON),
    "JSON of equal keys": ("/v1/recipes/validate", "{" + '"k":1,' * (RECIPE_LIMIT // 6 - 9) + '"k":1}', JSON),
    "YAML of many keys": ("/v1/recipes/validate", "\n".join(f"k{n}: 1" for n in range(RECIPE_LIMIT // 10)), YAML),
    "a submission": ("/v1/jobs", keys(RECIPE_LIMIT), JSON),
    "a plan": ("/v1/recipes/plan", keys(RECIPE_LIMIT), JSON),
    "a push of many keys": (f"/v1/jobs/{'0' * 12}/push", keys(8_000), JSON | {"X-Hub-Token": "x"}),
    "a push of many more": (f"/v1/jobs/{'0' * 12}/push", keys(SIZE), JSON | {"X-Hub-Token": "x"}),
    "a push of brackets": (f"/v1/jobs/{'0' * 12}/push", "[" * SIZE, JSON | {"X-Hub-Token": "x"}),
    "a form of separators": ("/submit/check", "&" * SIZE, FORM),
    "a form of fields": ("/submit/check", "&".join(f"a{n}=" for n in range(SIZE // 8)), FORM),
    "a form of escapes": ("/submit/check", "recipe=" + "%41" * (SIZE // 3 - 5), FORM),
    "a form of parts": ("/submit/check", PART * (SIZE // 60) + "--x--\r\n", MULTIPART),
    "the editor": ("/submit/check?typed=true", urlencode({"recipe": "a: b\n" * (RECIPE_LIMIT // 6)}), FORM),
    "the form": ("/submit/compose", urlencode({"recipe": "a: b\n" * (RECIPE_LIMIT // 6), "model": "b/c"}), FORM),
    "every answer of the form": ("/submit/compose", urlencode(ANSWERS | {"recipe": LONG}), FORM),
    "the form of digits": ("/submit/compose", urlencode(ANSWERS | {"recipe": f"k: {'9' * (RECIPE_LIMIT - 9)}"}), FORM),
    "the editor's submission": ("/submit", urlencode({"recipe": "a: b\n" * (RECIPE_LIMIT // 6)}), FORM),
}


@contextmanager
def watched_loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, str]]]:
    """Processor seconds of every callback of every event loop of this process: other processes do not count.

    Nor does Python's garbage collector, which looks through all that earlier tests left in this process.
    """
    spans: list[tuple[float, str]] = []
    run = asyncio.events.Handle._run

    def timed(handle: asyncio.events.Handle) -> None:
        begin = time.thread_time()
        run(handle)
        spans.append((time.thread_time() - begin, repr(handle)))

    with monkeypatch.context() as patched:
        patched.setattr(asyncio.events.Handle, "_run", timed)
        gc.disable()
        try:
            yield spans
        finally:
            gc.enable()


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service that has answered before: templates and models of requests are compiled once."""
    found = ServiceHarness(tmp_path_factory.mktemp("bodies"), rate=1e9, burst=10**9)
    found.http.post("/submit/check", data={"recipe": RECIPE})
    found.http.post("/v1/recipes/validate", content=RECIPE, headers=YAML)
    return found


@pytest.mark.parametrize(("path", "body", "headers"), BODIES.values(), ids=list(BODIES))
def test_no_body_holds_the_event_loop(
    harness: ServiceHarness, monkeypatch: pytest.MonkeyPatch, path: str, body: str, headers: dict[str, str]
) -> None:
    """Whatever is sent, no piece of work on the loop takes 50 ms of processor time."""
    with watched_loops(monkeypatch) as spans:
        answer = harness.http.post(path, content=body, headers=headers)
    assert answer.status_code in (200, 400, 404, 413, 415, 422)
    longest, where = max(spans)
    assert longest < LONGEST, where


LONG = 46_000  # bytes of headers that the server takes
HEADERS = {
    "a cookie of escapes": {"Cookie": 'x="' + "\\" * LONG},
    "our cookie of escapes": {"Cookie": 'llmprune_session="' + "\\" * LONG},
    "many cookies": {"Cookie": "; ".join(f"c{n}=1" for n in range(LONG // 9))},
    "a list of ranges": {"Range": "bytes=" + ",".join(f"{n}-{n}" for n in range(LONG // 12))},
    "a content type of parameters": {"Content-Type": "application/json" + ";a=" * (LONG // 3)},
    "a long host": {"Host": "[" * LONG},
    "a long origin": {"Origin": "http://" + "[" * LONG},
    "accept": {"Accept": "text/html," * (LONG // 10)},
    "authorization": {"Authorization": "Bearer " + "x " * (LONG // 2)},
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=list(HEADERS))
@pytest.mark.parametrize("path", ["/v1/health", "/v1/jobs", "/static/app.js", f"/v1/jobs/{'0' * 12}/push"])
def test_no_header_holds_the_event_loop(
    harness: ServiceHarness, monkeypatch: pytest.MonkeyPatch, path: str, headers: dict[str, str]
) -> None:
    """Also before anybody is known, a header costs little: cookies that are not ours are never parsed."""
    with watched_loops(monkeypatch) as spans:
        answer = harness.http.request("POST" if path.endswith("push") else "GET", path, headers=headers)
    assert answer.status_code < 500
    longest, where = max(spans)
    assert longest < LONGEST, where


@pytest.mark.parametrize("path", ["/v1/health", "/login", "/v1/jobs", "/v1/compare", "/now"])
def test_no_query_holds_the_event_loop(harness: ServiceHarness, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Thousands of parameters are refused before any of them is read."""
    with watched_loops(monkeypatch) as spans:
        answer = harness.http.get(f"{path}?{'a&job=&' * 6_500}")
    assert (answer.status_code, "at most 200 query parameters" in answer.text) == (422, True)
    longest, where = max(spans)
    assert longest < LONGEST, where


def test_a_body_above_a_limit_is_a_problem_or_a_page(harness: ServiceHarness) -> None:
    """It says the limit, also where it is the route's own, which is applied before any of our code reads the body."""
    answer = harness.http.post(f"/v1/jobs/{'0' * 12}/push", content="x" * 9_000, headers=JSON)
    assert (answer.status_code, answer.headers["Content-Type"]) == (413, "application/problem+json")
    assert answer.json()["title"] == "too large"
    assert "has 9,000 bytes; this address takes at most 8,192 (8.19 KB): shorten" in answer.json()["detail"]
    page = harness.http.post("/submit/check", content="x" * 9_000_000, headers={"Accept": "text/html"})
    assert (page.status_code, page.headers["Content-Type"]) == (413, "text/html; charset=utf-8")
    assert "has 9,000,000 bytes; this address takes at most 131,072 (131 KB): shorten" in page.text


def test_a_recipe_over_the_network_is_small(harness: ServiceHarness, tmp_path: Path) -> None:
    """A body, a form's text and an override above the limit are refused before anything reads them."""
    large = RECIPE + "#" * RECIPE_LIMIT
    for kind in (YAML, JSON):
        answer = harness.http.post("/v1/recipes/validate", content=large, headers=kind)
        assert (answer.status_code, answer.json()["title"]) == (413, "too large")
    assert "at most 32,768" in harness.http.post("/submit/check", data={"recipe": large}).text
    with pytest.raises(RecipeError, match="at most 32,768"):
        admit(RECIPE, (f"model.id={'x' * (RECIPE_LIMIT + 1)}",), settings=Settings(data_dir=tmp_path))
    with pytest.raises(RecipeError, match="nested more than 20 deep"):
        admit(RECIPE, (f"{'a.' * 10_000}b=1",), settings=Settings(data_dir=tmp_path))


def test_problems_of_parameters_are_shortened(harness: ServiceHarness) -> None:
    """A push with hundreds of unknown keys is answered with the first, and a count."""
    answer = harness.http.post(f"/v1/jobs/{'0' * 12}/push", content=keys(8_000), headers=JSON | {"X-Hub-Token": "x"})
    assert answer.status_code == 422
    assert len(answer.json()["problems"]) == MOST_PROBLEMS + 1
    assert answer.json()["problems"][-1].endswith("more problems")


def test_forms_have_few_fields_and_one_kind(harness: ServiceHarness) -> None:
    """The pages' own forms fit; what only an attack would send is refused."""
    many = harness.http.post("/submit/check", content="&".join(f"a{n}=" for n in range(60)), headers=FORM)
    assert many.status_code == 422
    assert harness.http.post("/submit/check", content=PART + "--x--\r\n", headers=MULTIPART).status_code == 415
    assert harness.http.post("/submit/check", data={"recipe": RECIPE}).status_code == 200


def test_many_problems_are_shortened_in_linear_work() -> None:
    """20,000 mistakes: the first are listed, the others counted. In quadratic work this test takes minutes."""
    data = {f"key{n}": 1 for n in range(20_000)}
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(data)
    said = describe_problems(caught.value, Recipe, data=data)
    assert len(said) == MOST_PROBLEMS + 1
    assert said[0] == "model: is missing; add it (The model to prune)"
    assert said[-1] == "and 19,981 more problems"
    error = RecipeError([f"problem {n}" for n in range(1_000)], "recipe")
    assert (len(error.problems), error.problems[-1]) == (MOST_PROBLEMS + 1, "and 980 more problems")
    assert RecipeError(error.problems).problems == error.problems, "raised again, nothing is cut anew"


def test_repeated_keys_are_found_in_linear_work(harness: ServiceHarness) -> None:
    """The repeated key of a JSON recipe is named, and not its thousands of neighbours."""
    body = json.dumps({f"k{n}": 1 for n in range(2_000)})[:-1] + ', "k7": 2}'
    answer = harness.http.post("/v1/jobs", content=body, headers=JSON)
    assert (answer.status_code, answer.json()["problems"]) == (
        422,
        ["not valid JSON: 'k7' is given twice; keep one of them"],
    )


def test_patterns_work_in_linear_time() -> None:
    """Text that has a pattern begin everywhere and end nowhere. In quadratic work this test takes minutes."""
    assert redact("http://" * 200_000 + "?key=secret").endswith("?***")
    with pytest.raises(ValueError, match="a split is a name"):
        readable_split("train[" + "1" * 200_000)


def test_one_caller_has_one_turn() -> None:
    """A caller's recipes are read one after the other, two callers' at the same time, however long a queue is."""
    meeting = threading.Barrier(2, timeout=10)
    at_work: list[str] = []

    def alone(caller: str) -> None:
        assert caller not in at_work
        at_work.append(caller)
        time.sleep(0.01)
        at_work.remove(caller)

    async def everything() -> None:
        recipes = RecipeQueue()
        await asyncio.gather(*(recipes.run("ann", alone, "ann") for _ in range(6)))
        await asyncio.gather(recipes.run("ann", meeting.wait), recipes.run("bob", meeting.wait))
        gate = threading.Event()
        waiting = [asyncio.ensure_future(recipes.run("ann", gate.wait, 10)) for _ in range(60)]
        await asyncio.sleep(0)
        await recipes.run("bob", alone, "bob")  # more requests than worker threads wait, and hold one of them
        gate.set()
        await asyncio.gather(*waiting)
        assert not recipes._queues, "nobody is remembered"

    asyncio.run(everything())
