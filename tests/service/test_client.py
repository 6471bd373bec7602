"""The client and its commands: what a person reads where an answer or an argument makes no sense."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from helpers.commands import Outcome, command
from helpers.service import answer_requests
from helpers.service_answers import ENDED, EVENT, JOB, LISTED, PAGE, QUEUE, URL, Answer, page, talking_to

from llmprune.common.errors import RecipeError, ServiceError
from llmprune.common.hub.client import retry_after_seconds
from llmprune.service.client import answers, event_stream
from llmprune.service.client.server import DEFAULT_SERVER
from llmprune.service.client.sync.client import Client


def ask(monkeypatch: pytest.MonkeyPatch, answer: Answer, *arguments: str | Path) -> Outcome:
    """Run a command on a service that answers as given."""
    answer_requests(monkeypatch, answer)
    server = () if "--server" in arguments else ("--server", URL)
    return command(*arguments, *server)


HTML = b"<html><body>Please sign in to this network"


NONSENSE: list[tuple[httpx.Response | Callable[[], httpx.Response], str]] = [
    (lambda: page(HTML, content_type="text/html"), "200 with text/html, 42 bytes that begin '<html><body>Please"),
    (lambda: page(b""), "200 with no content type and no body"),
    (lambda: page(b'{"id": "0123', content_type="application/json"), "200 with application/json, 12 bytes that begin"),
    (lambda: page(b"[" * 100_000), "200 with no content type, 100,000 bytes"),
    (lambda: page(b"1" * 10_000), "200 with no content type, 10,000 bytes"),
    (lambda: page(b"\xff\xfe\x00"), "200 with no content type, 3 bytes"),
    (lambda: page(b"null"), "200 with JSON that does not fit"),
    (lambda: page(b'[{"id": "x"}]'), "200 with JSON that does not fit"),
    (lambda: page(b'{"jobs": 3, "id": 3, "state": 3}'), "200 with JSON that does not fit"),
    (lambda: page(b"{}"), "200 with JSON that does not fit"),
    (
        lambda: page(b"", 302, location="http://elsewhere.test/login"),
        "302 with no content type and no body, and redirects",
    ),
    (lambda: page(HTML, 502, content_type="text/html"), "502 with text/html, 42 bytes"),
    (lambda: page(b'{"detail": "no"}', 404), "404 with no content type, 16 bytes"),
    (lambda: page(b'{"detail": "no", "problems": 3}', 422), "422 with no content type"),
    (lambda: page(HTML, content_encoding="gzip"), "200 with the compression 'gzip'"),
]


VERBS = ("submit", "jobs", "watch", "cancel", "retry", "reevaluate-job", "fetch", "push-job")


EVERY_VERB = [(verb, *NONSENSE[number]) for verb in VERBS for number in (0, 8, 10)]


EVERY_ANSWER = [("cancel", *nonsense) for nonsense in NONSENSE]


@pytest.mark.parametrize(("verb", "answer", "said"), EVERY_VERB + EVERY_ANSWER)
def test_an_answer_that_makes_no_sense_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, answer: Callable[[], httpx.Response], said: str
) -> None:
    """Every command names the address, the answer and the remedy in one line, and exits with 1."""
    (tmp_path / "file").write_text("model: {id: org/x}\n")
    given: dict[str, list[str | Path]] = {"submit": [tmp_path / "file"], "jobs": []}
    given["push-job"] = [JOB, "--repo-id", "org/x", "--hub-token-file", tmp_path / "file"]
    if verb == "push-job":
        (tmp_path / "file").write_text("hf_token")
    outcome = ask(monkeypatch, lambda _: answer(), verb, *given.get(verb, [JOB]))
    assert outcome.code == 1, outcome.err
    assert f"{URL}/v1/jobs" in outcome.err
    assert said in outcome.err
    assert "check --server" in outcome.err
    assert (len(outcome.err.splitlines()), outcome.out) == (1, ""), outcome.err


@pytest.mark.parametrize("ask_for", ["plan", "queue", "compare", "jobs", "job"])
def test_every_call_of_the_client_checks_its_answer(ask_for: str) -> None:
    """In Python an answer of another shape raises ServiceError."""
    calls: dict[str, Callable[[Client], Any]] = {
        "plan": lambda client: client.plan("x: 1\n"),
        "queue": lambda client: client.queue(),
        "compare": lambda client: client.compare([JOB]),
        "jobs": lambda client: list(client.jobs()),
        "job": lambda client: client.job(JOB),
    }
    with talking_to(lambda _: page(b'[{"name": 3}, 4]')) as client, pytest.raises(ServiceError, match="no answer of"):
        calls[ask_for](client)


def test_an_answer_is_read_within_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A body, a line of events and a file above their limits are refused, and no part of the file is kept."""
    monkeypatch.setattr(answers, "BODY_LIMIT", 1000)
    monkeypatch.setattr(event_stream, "LINE_LIMIT", 1000)
    given: list[int] = []

    def endless() -> Iterator[bytes]:
        while True:
            given.append(1)
            yield b"x" * 100

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/artifacts"):
            return page(json.dumps([{"name": "model.safetensors", "bytes": 500}]).encode())
        if request.url.path.endswith(JOB):
            return page(json.dumps(ENDED).encode())
        return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=endless())

    with talking_to(answer) as client:
        with pytest.raises(ServiceError, match=r"a line of more than 1 KB"):
            list(client.job(JOB).events())
        with pytest.raises(ServiceError, match=r"more than 1 KB"):
            client.queue()
        with pytest.raises(ServiceError, match=r"model\.safetensors answered 200 with more than 500 B"):
            client.job(JOB).fetch(tmp_path / "out", check=False)
    assert len(given) < 40
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".llmprune-job.json"]


def event(data: dict[str, Any], number: str = "1") -> bytes:
    """An event as the service sends it."""
    return f"id: {number}\ndata: {json.dumps(data)}\n\n".encode()


@pytest.mark.parametrize(
    "event",
    [
        b"data: <html>\n\n", b"data: []\n\n", event({"state": 3}), event(EVENT | {"fraction": float("nan")}),
        event(EVENT, "é"), event(EVENT, "9" * 30),
    ],
)  # fmt: skip
def test_an_event_that_makes_no_sense(event: bytes) -> None:
    """An event of another shape raises ServiceError."""
    told = pytest.raises(ServiceError, match=f"{URL}/v1/jobs/{JOB}/events answered 200 with")

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            return page(event, content_type="text/event-stream")
        return page(json.dumps(ENDED).encode())

    with talking_to(answer) as client, told:
        list(client.job(JOB).events())


def test_infinite_figures_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite figures are strings in JSON, and their jobs are listed with the others."""
    sizes = dict.fromkeys(("parameters", "bytes", "layers"), (2, 1))
    listed = [LISTED | {"figures": sizes | {"retention": value}} for value in ("Infinity", "NaN", 0.5, None)]
    outcome = ask(monkeypatch, lambda _: page(json.dumps(PAGE | {"jobs": listed}).encode()), "jobs")
    assert (outcome.code, outcome.out.count(JOB), "50.0%" in outcome.out) == (0, 4, True), outcome.err


def test_a_connection_that_breaks_is_one_sentence() -> None:
    """After several tries a broken connection raises ServiceError with the reason."""

    def cut(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("peer closed connection", request=request)

    with talking_to(cut) as client, pytest.raises(ServiceError, match="does not finish its answer: peer closed"):
        client.queue()


@pytest.mark.parametrize(
    ("retry_after", "pause"),
    [
        ("0.5", 0.5), ("3", 3.0), ("-5", 1.0), ("", 1.0), ("soon", 1.0), ("nan", 1.0), ("9" * 400, 10.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("Fri, 31 Dec 9999 23:59:59 GMT", 10.0), ("Wed, 99 Foo", 1.0),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date(retry_after: str, pause: float) -> None:
    """The client waits as long as the service asks, at most 10 s, and 1 s where the header cannot be read."""
    given = iter([page(b"", 503, retry_after=retry_after), page(json.dumps(QUEUE).encode())])
    pauses: list[float] = []
    with talking_to(lambda _: next(given), pauses) as client:
        assert client.queue().slots == 1
    assert pauses == [pause]


def test_retry_after_a_date_to_come() -> None:
    """A date means the seconds until then."""
    assert retry_after_seconds(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jobs", "--state", "done"], "--state 'done': there is no such state; choose queued, running, cancelling"),
        (["jobs", "--state", "succeded"], "did you mean 'succeeded'?"),
        *(([verb, "x"], "there is no job 'x': an id is 12") for verb in ("watch", "cancel", "retry", "fetch")),
        (["watch", "../../v1/queue"], "there is no job '../../v1/queue'"),
    ],
)
def test_commands_without_a_recipe_mention_none(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    """An unknown state and an impossible id are refused without a request, and no recipe is mentioned."""
    outcome = ask(monkeypatch, lambda _: pytest.fail("asked"), *arguments)
    assert (outcome.code, said in outcome.err, "recipe" in outcome.err) == (2, True, False), outcome.err


def test_a_problem_of_parameters_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's own summary precedes its problems."""
    problem = {"detail": "the parameters are wrong", "problems": ["limit: too large"]}
    outcome = ask(monkeypatch, lambda _: page(json.dumps(problem).encode(), 422), "jobs")
    assert (outcome.code, outcome.err) == (2, "llmprune: the parameters are wrong: limit: too large\n")


@pytest.mark.parametrize(
    ("server", "said"), [("127.0.0.1:8321", "give a URL such as"), ("ftp://x", "give a URL"), ("http://", "give a URL")]
)
def test_a_server_that_is_no_url(server: str, said: str) -> None:
    """An address that is no URL is refused before anything is sent."""
    outcome = command("jobs", "--server", server)
    assert (outcome.code, said in outcome.err) == (2, True), outcome.err


@pytest.mark.parametrize("content", ["a b", "tökén", "a\nb"])
def test_a_token_that_no_header_holds(tmp_path: Path, content: str) -> None:
    """A token with spaces or letters beyond ASCII is refused, and so is an empty file."""
    (tmp_path / "token").write_text(content)
    outcome = command("jobs", "--server", URL, "--token-file", tmp_path / "token")
    assert (outcome.code, "that no token has; copy it again" in outcome.err) == (2, True), outcome.err
    (tmp_path / "token").write_text(" \n")
    outcome = command("jobs", "--server", URL, "--token-file", tmp_path / "token")
    assert (outcome.code, "is empty" in outcome.err) == (2, True), outcome.err


def test_the_client_names_unknown_states() -> None:
    """Client.jobs refuses an unknown state with the list of states."""
    with talking_to(lambda _: page(json.dumps(PAGE).encode())) as client:
        assert [job.id for job in client.jobs(state=["failed", "queued"])] == [JOB]
        with pytest.raises(RecipeError, match="choose queued"):
            client.page(state="finished")


def test_submit_says_which_paths_the_service_reads_on_its_own_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path that exists here is reported before submission; an absolute one only for another machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "auto").touch()  # a value of the recipe that is no path
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{id: base, device_map: auto}}\n"
        f"calibration: {{sources: [{{dataset: {tmp_path}/text.txt}}, {{dataset: org/text}}]}}\ndepth: {{remove: 1}}\n"
    )
    sent: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.url.path)
        return page(json.dumps(ENDED).encode())

    here = ("--server", DEFAULT_SERVER)
    outcome = ask(monkeypatch, answer, "submit", recipe, *here)
    note = "llmprune: note: model.id: 'base' is a folder here, but the service looks for it on its own machine"
    assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (0, f"{JOB}\n", 1), outcome.err
    assert outcome.err.startswith(note)
    overridden = ask(monkeypatch, answer, "submit", recipe, "--set", "calibration.sources.0.dataset=text.txt", *here)
    assert "calibration.sources.0.dataset: 'text.txt' is a file here" in overridden.err
    far = ask(monkeypatch, answer, "submit", recipe, "--server", "http://far.test:8321")
    assert f"calibration.sources.0.dataset: '{tmp_path}/text.txt' is a file here" in far.err
    assert len(sent) == 3
