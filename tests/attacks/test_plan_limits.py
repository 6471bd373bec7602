"""Limits of a plan without any option: time, memory, and the turn of a caller."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import save_model
from helpers.service import RECIPE, YAML, ServiceHarness
from helpers.tiny import structure_of

from llmprune import Recipe, RecipeError
from llmprune.service.planner.planner import Planner
from llmprune.service.planner.queue import MAX_WAITING, PlannerBusy, PlanQueue, TooManyPlans

MB = 10**6


def worker(program: str) -> tuple[str, ...]:
    """Process in place of the one that makes plans: ``program`` sees each question as ``asked``."""
    head = "import json, sys, time\nfor line in sys.stdin:\n asked = json.loads(line)['recipe']\n "
    return sys.executable, "-c", head + program.replace("\n", "\n ") + "\n sys.stdout.flush()"


ECHO = "print(json.dumps({'plan': asked}))"


def test_a_plan_that_takes_too_long_keeps_its_caller_out_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is ended, the caller waits a minute, another caller's plan is made at once."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))  # a busy machine allows more time
    planner = Planner(tmp_path, worker(f"time.sleep(60 if asked == 'slow' else 0)\n{ECHO}"))
    try:
        planner.plan("quick", (), caller="ann")  # the process has started: its start counts as time of a plan
        planner.limit = 1.0
        assert "longer than 1 s" in planner.plan("slow", (), caller="mallory")["problems"][0]
        planner.limit = 60.0
        assert planner.plan("other", (), caller="ann") == {"plan": "other"}
        with pytest.raises(TooManyPlans, match="too much time or memory; ask again in 60 s") as refused:
            planner.plan("quick", (), caller="mallory")
        assert 50 < refused.value.wait <= 60
    finally:
        planner.close()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("held = bytearray(b'x') * (150 * 10**6); time.sleep(60)", "more than 100 MB of memory"),
        ("print('x' * 2_000_000)", "longer than 1 MB"),
        ("sys.exit(1)", "the process that makes plans ended"),
        ("print('no JSON')", "the process that makes plans ended"),
    ],
)
def test_a_plan_that_takes_too_much_is_not_remembered(tmp_path: Path, program: str, said: str) -> None:
    """Memory, an endless answer, a death: the caller is kept out, and for others the recipe is planned anew."""
    mark = f"mark = pathlib.Path({str(tmp_path / 'mark')!r})"
    first = f"import pathlib\n{mark}\nif not mark.exists():\n mark.touch()\n {program}"
    planner = Planner(tmp_path, worker(f"{first}\n{ECHO}"), memory=100 * MB)
    try:
        assert said in planner.plan("x", (), caller="mallory")["problems"][0]
        with pytest.raises(TooManyPlans):
            planner.plan("x", (), caller="mallory")
        assert planner.plan("x", (), caller="ann") == {"plan": "x"}
    finally:
        planner.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """A process that holds every descriptor up to 1,100, as a server with many connections does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY)]
    while held[-1] < 1_100:
        held.append(os.dup(held[0]))
    yield
    for descriptor in held:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_plans_are_made_however_many_files_are_open(tmp_path: Path) -> None:
    """Many connections leave the worker descriptors that select() does not take."""
    planner = Planner(tmp_path, worker(ECHO))
    try:
        assert planner.plan("x", (), caller="ann") == {"plan": "x"}
    finally:
        planner.close()


def test_a_process_that_cannot_start_is_not_the_caller_s_fault(tmp_path: Path) -> None:
    """The answer says why and when to ask again; once the system starts processes, the same caller gets the plan."""
    planner = Planner(tmp_path, (str(tmp_path / "missing"),))
    try:
        with pytest.raises(
            PlannerBusy, match=r"cannot start \(No such file or directory\); ask again in a minute"
        ) as busy:
            planner.plan("x", (), caller="ann")
        assert not isinstance(busy.value, TooManyPlans)
        planner.command = worker(ECHO)
        assert planner.plan("x", (), caller="ann") == {"plan": "x"}
    finally:
        planner.close()


def test_a_plan_ends_with_the_service(tmp_path: Path) -> None:
    """A worker that is killed while it makes a plan gives a sentence, and no error in the service."""
    planner = Planner(tmp_path, worker("time.sleep(60)"))
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(planner.plan("x", (), caller="ann")))
    asking.start()
    wait_for(lambda: planner._worker)
    time.sleep(0.4)  # the thread waits for the answer
    planner.close()
    asking.join(10)
    assert "the process that makes plans ended" in answers[0]["problems"][0]
    assert planner._worker is None


def test_plans_are_remembered_and_problems_are_not(tmp_path: Path) -> None:
    """A hub that was away for a moment does not refuse a recipe for minutes."""
    counted = "count = globals().get('count', 0) + 1\nprint(json.dumps({asked: [count]}))"
    planner = Planner(tmp_path, worker(counted))
    try:
        assert [planner.plan("plan", (), caller="ann")["plan"] for _ in range(2)] == [[1], [1]]
        assert [planner.plan("problems", (), caller="ann")["problems"] for _ in range(2)] == [[2], [3]]
    finally:
        planner.close()


def test_penalties_double_and_are_forgotten() -> None:
    """1, 2, 4 … at most 60 minutes; a quiet hour after the last one it begins anew."""
    now = [0.0]
    queue = PlanQueue(clock=lambda: now[0])
    lengths = []
    for _ in range(8):
        queue.penalise("mallory")
        with pytest.raises(TooManyPlans) as refused, queue.place("mallory"):
            pass
        lengths.append(refused.value.wait / 60)
        now[0] += refused.value.wait
        with queue.place("mallory"):
            pass
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60]
    now[0] += 3600
    queue.penalise("mallory")
    with pytest.raises(TooManyPlans) as refused, queue.place("mallory"):
        pass
    assert refused.value.wait == 60


def test_one_plan_of_a_caller_and_few_of_all_wait() -> None:
    """So that waiting plans never hold all of the server's threads."""
    queue = PlanQueue()
    with ExitStack() as places:
        for number in range(MAX_WAITING):
            places.enter_context(queue.place(f"caller {number}"))
        with pytest.raises(TooManyPlans, match="a plan of yours is being made"), queue.place("caller 0"):
            pass
        with pytest.raises(PlannerBusy, match="8 others wait") as busy, queue.place("another"):
            pass
        assert not isinstance(busy.value, TooManyPlans)
    with queue.place("caller 0"), queue.place("another"):
        pass


def wait_for(reached: Callable[[], object]) -> None:
    """Until a condition holds."""
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_plan_of_the_same_caller_is_refused_at_once(tmp_path: Path) -> None:
    """Over HTTP with 429 and Retry-After, where another caller waits; the page says so and asks again by itself."""
    planner = Planner(tmp_path, worker("time.sleep(30)"), limit=30.0)
    harness = ServiceHarness(tmp_path, planner)
    headers = [
        YAML | {"Authorization": f"Bearer {harness.service.tokens.create(name, 'user')}"} for name in ("ann", "bob")
    ]

    def ask(number: int) -> Any:
        return harness.http.post("/v1/recipes/plan", content=RECIPE, headers=headers[number])

    first = threading.Thread(target=ask, args=(0,))
    first.start()
    try:
        wait_for(lambda: planner._worker)
        second = ask(0)
        assert (second.status_code, second.headers["Retry-After"]) == (429, "2")
        form = {"Authorization": headers[0]["Authorization"]}
        page = harness.http.post("/submit/plan", data={"recipe": RECIPE}, headers=form)
        assert page.status_code == 200
        assert 'hx-trigger="load delay:2s"' in page.text
        with ExitStack() as places:
            for number in range(MAX_WAITING - 1):
                places.enter_context(planner.queue.place(f"caller {number}"))
            third = ask(1)
        assert (third.status_code, third.headers["Retry-After"]) == (503, "60")
        assert harness.http.get("/v1/health").status_code == 200
    finally:
        assert planner._worker is not None
        planner._worker.kill()
        first.join(10)
        planner.close()
    kept_out = ask(0)
    assert kept_out.status_code == 429
    assert int(kept_out.headers["Retry-After"]) > 50


def test_a_number_of_layers_beyond_any_memory_is_refused(tmp_path: Path) -> None:
    """A plan counts the layers that would go; it makes no set of them."""
    save_model(tmp_path, tokenizer=False)
    text = f"model: {{id: {tmp_path}}}\ncalibration: {{dataset: org/text}}\ndepth: {{remove: {10**18}}}\n"
    with pytest.raises(RecipeError, match="remove at most 3"):
        structure_of(Recipe.parse(text))
