"""Foreign text on a terminal: names, errors, steps, file names and log lines hold nothing that a terminal obeys."""

from __future__ import annotations

import json
import logging
import unicodedata
from io import StringIO
from pathlib import Path

import httpx2 as httpx
import pytest
from helpers.commands import Outcome, command, save_model
from helpers.service import RECIPE, YAML, ServiceHarness
from helpers.service_answers import ENDED
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from llmprune.common.console import PlainConsole
from llmprune.common.printing import LOG_FORMAT, LineFormatter, printable, printable_message
from llmprune.service.client.sync.client import Client
from llmprune.service.jobs.store import write_event
from llmprune.service.jobs.submission import default_name

LINK = "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\"
CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"
HOSTILE = (
    f"{LINK}{CLIPBOARD}\x1b[2J\r\x9b31mroot\u202egnp.exe\u2066\u200f\u200b\ufeff\x7f\x08[link=http://evil]x[/link]"
)

JOB = "0123456789ab"
PUSHED = ENDED | {
    "published": {"repo_id": "org/x", "commit": "c", "url": HOSTILE, "pull_request": None, "files": 3, "bytes": 9}
}


def unprintable(text: str) -> set[str]:
    """The characters of an output that are neither printable nor line feeds."""
    return {char for char in text if not char.isprintable() and char != "\n"}


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServiceHarness:
    """A service that the client commands of this process call."""
    harness = ServiceHarness(tmp_path, rate=1e6, burst=10**6)
    monkeypatch.setattr("llmprune.service.cli.commands.client_of", lambda server, token_file: harness.client())
    return harness


def hostile_job(harness: ServiceHarness, state: str = "failed") -> str:
    """A job whose every text is hostile, as an older service or another program may have stored it."""
    job: str = harness.submit()["id"]
    with harness.service.database.write() as connection:
        texts = dict.fromkeys(("name", "owner", "model", "step"), HOSTILE) | {
            "error": f"{HOSTILE}\nsucceeded after 1 s"
        }
        columns = ", ".join(f"{name} = ?" for name in texts)
        connection.execute(f"UPDATE jobs SET {columns}, state = ? WHERE id = ?", [*texts.values(), state, job])
        write_event(connection, job)
    return job


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain − 75% MLP, naïve 模型 🙂", "plain − 75% MLP, naïve 模型 🙂"),
        ("no-break\xa0and ideographic\u3000spaces", "no-break\xa0and ideographic\u3000spaces"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\rb\tc\nd\x00", r"a\rb\tc\nd\x00"),
        ("\x7f\x85\x9b", r"\x7f\x85\x9b"),
        ("\u202e\u2066\u2069\u200e\u200f\u061c", r"\u202e\u2066\u2069\u200e\u200f\u061c"),
        ("\u200b\u2060\ufeff\xad\U000e0041", r"\u200b\u2060\ufeff\xad\U000e0041"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\ud800", r"\ud800"),
        ("\ue000\U0010ffff", r"\ue000\U0010ffff"),
    ],
)
def test_what_prints_nothing_becomes_an_escape(text: str, shown: str) -> None:
    """Letters, signs and spaces stay; control, format and separator characters and lone surrogates are written out."""
    assert printable(text) == shown
    assert printable(shown) == shown
    shown.encode("utf-8")


def test_every_control_and_format_character_becomes_an_escape() -> None:
    """No character of the categories that move, hide or reorder text is missed."""
    risky = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert len(risky) > 2000
    assert all(printable(char).isascii() and printable(char).isprintable() for char in risky)


def test_line_feeds_stay_only_where_they_are_wanted() -> None:
    """Of an error message the breaks of its own list stay, and no other that would look like a new message."""
    assert printable("a\nb\r\nc", newlines=True) == "a\nb\\r\nc"
    assert printable_message("2 problems\n  - a\nllmprune: done\n  - b") == "2 problems\n  - a\\nllmprune: done\n  - b"


def test_listed_and_watched_jobs_send_nothing_to_the_terminal(harness: ServiceHarness) -> None:
    """``llmprune jobs`` and ``watch`` print a hostile job's texts as escapes, without markup and without new lines."""
    job = hostile_job(harness)
    listed, watched = command("jobs"), command("watch", job)
    assert (listed.code, watched.code) == (0, 1)
    for said in (listed.out, listed.err, watched.out, watched.err):
        assert not unprintable(said), said
    assert r"\x1b" in listed.out.replace("\n", "")
    assert "[link=http://evil]" in watched.err
    assert not any(line.startswith("succeeded") for line in watched.err.splitlines()), watched.err


def test_json_for_machines_is_ascii(harness: ServiceHarness, tmp_path: Path) -> None:
    """``--json`` output holds no raw control or direction character, and reads back to the very text."""
    hostile_job(harness)
    said = command("jobs", "--json").out
    assert said.isascii()
    assert json.loads(said)["jobs"][0]["name"] == HOSTILE
    model = save_model(tmp_path / "a\u202eb\x9b")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"model": {"id": str(model)}, "calibration": {"dataset": "x", "sequence_length": 8}}), "utf-8"
    )
    for arguments in (("plan", recipe, "--json"), ("anatomy", model, "--json")):
        outcome = command(*arguments)
        assert outcome.code == 0, outcome.err
        assert outcome.out.isascii()


def test_messages_of_a_hostile_service_are_printed_as_escapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refusals, states and the names of fetched files come from a server that may be anybody's."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/artifacts"):
            return httpx.Response(200, json=[{"name": "a\x1b[2J\u202eb", "bytes": 2}])
        if "/artifacts/" in request.url.path:
            return httpx.Response(200, content=b"ok")
        if request.url.path.endswith("/push"):
            return httpx.Response(201, json=ENDED)
        if request.url.path.endswith("/events"):
            return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, text="")
        if request.url.path.endswith(f"/jobs/{JOB}"):
            return httpx.Response(200, json=PUSHED)
        if request.url.path.endswith("/cancel"):
            return httpx.Response(200, json=ENDED | {"state": HOSTILE})
        return httpx.Response(409, json={"detail": f"{HOSTILE}\nllmprune: done", "problems": []})

    monkeypatch.setattr(
        "llmprune.service.cli.commands.client_of",
        lambda server, token_file: Client(server, transport=httpx.MockTransport(answer)),
    )
    fetched, cancelled, refused = command("fetch", JOB, "-o", tmp_path), command("cancel", JOB), command("retry", JOB)
    token = tmp_path / "token.txt"
    token.write_text("hf_of_the_test")
    pushed = command("push-job", JOB, "--repo-id", "org/x", "--hub-token-file", token)
    assert (fetched.code, cancelled.code, refused.code, pushed.code) == (1, 1, 1, 0)
    for outcome in (fetched, cancelled, refused, pushed):
        assert not unprintable(outcome.out + outcome.err)
    assert r"the service named the file 'a\x1b[2J\u202eb'" in fetched.err
    assert len(refused.err.splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        'model: {id: org/x, "k\\e]52;c;aGk=\\ay\\u202e\\nllmprune: done": 1}\ncalibration: {dataset: x}\n',
        'model: {id: "org/\\e[31m\\u202ex/y"}\ncalibration: {dataset: x}\ndepth: {remove: 1}\n',
        'model: {id: org/x}\ncalibration: {dataset: "a\\e[2Jb"}\n"\\e[H": 1\n',
    ],
)
def test_a_wrong_recipe_is_reported_as_escapes(tmp_path: Path, text: str) -> None:
    """Keys and values of a recipe come back in its error, one line for each problem."""
    (tmp_path / "recipe.yaml").write_text(text)
    said = command("plan", tmp_path / "recipe.yaml")
    assert said.code == 2
    assert not unprintable(said.err), said.err
    assert r"\x1b" in said.err
    assert all(line.startswith(("llmprune: ", "  - ")) for line in said.err.splitlines()), said.err


def test_foreign_text_in_a_models_config_is_printed_as_escapes(tmp_path: Path) -> None:
    """A config of the hub names its model type, which errors repeat."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": f"{HOSTILE}\nllmprune: done"}))
    said: Outcome = command("anatomy", tmp_path)
    assert said.code == 2
    assert not unprintable(said.err), said.err


def test_a_console_prints_tables_and_strings_as_they_are() -> None:
    """Plain strings are no markup; text objects, cells and progress lines lose their control characters."""
    console = PlainConsole()
    console.file = out = StringIO()
    table = Table(HOSTILE)
    table.add_row(HOSTILE, HOSTILE)
    for content in (HOSTILE, Text(HOSTILE, "bold"), table, Text.assemble(("a", "red"), HOSTILE)):
        console.print(content, soft_wrap=True)
    with Progress(TextColumn("{task.description}", markup=False), console=console) as progress:
        progress.add_task(HOSTILE)
    assert not unprintable(out.getvalue()), out.getvalue()
    assert "[link=http://evil]x[/link]" in out.getvalue()


def test_a_log_record_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A message cannot pretend to be the next record, and a traceback below it holds no escapes."""
    formatter = LineFormatter(LOG_FORMAT)
    record = logging.LogRecord(
        "llmprune", logging.WARNING, "", 0, "job %s", (f"{HOSTILE}\nERROR llmprune: gone",), None
    )
    assert len(formatter.format(record).splitlines()) == 1
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert not unprintable(formatter.format(record))
    assert "Traceback" in formatter.format(record)


def test_the_commands_log_prints_one_line_for_a_record() -> None:
    """Warnings of a run name files, models and answers of the hub."""
    logger = logging.getLogger("llmprune")
    before = list(logger.handlers)
    try:
        command("--version")
        (handler,) = logger.handlers
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(out := StringIO())
        logging.getLogger("llmprune.checkpoint.download").warning(
            "fetching %s", f"{HOSTILE}\nWARNING llmprune: all is well"
        )
    finally:
        logger.handlers = before
    assert not unprintable(out.getvalue())
    assert len(out.getvalue().splitlines()) == 1


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "\u202ecod", "a\u200bb", "a\x9bb", "a\u2028b"])
def test_a_jobs_name_holds_printable_characters_only(harness: ServiceHarness, name: str) -> None:
    """Over HTTP, from the form and from ``llmprune submit``, with a sentence that says why."""
    answer = harness.http.post("/v1/jobs", params={"name": name}, content=RECIPE, headers=YAML)
    assert answer.status_code == 422, answer.text
    assert "control, format or direction characters" in answer.json()["problems"][0]
    form = harness.http.post("/submit", data={"recipe": RECIPE, "name": f"x{name}x"})
    assert (form.status_code, "control, format or direction characters" in form.text) == (422, True)
    assert harness.http.get("/v1/jobs").json()["jobs"] == []


def test_a_name_made_from_a_model_is_printable() -> None:
    """A model's folder under an allowed root can have any name."""
    from llmprune.recipe.recipe import Recipe

    data = {"model": {"id": "/models/a\x1b[2J\u202eb"}, "calibration": {"dataset": "x"}, "depth": {"remove": 1}}
    assert default_name(Recipe.parse(json.dumps(data))) == r"a\x1b[2J\u202eb −1 layer"


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "\u202ecod", "a\u200bb", "naïve", ""])
def test_a_tokens_name_is_plain(tmp_path: Path, name: str) -> None:
    """``llmprune token create --name`` refuses what is no plain name, and prints the refusal as escapes."""
    said = command("token", "create", "--name", name, "--data-dir", tmp_path)
    assert (said.code, unprintable(said.err)) == (2, set())


def test_pages_show_direction_marks_of_names(harness: ServiceHarness) -> None:
    """A stored name, owner, model or error does not reorder the page around it."""
    job = hostile_job(harness)
    for address in ("/", f"/jobs/{job}", f"/jobs/{job}/live"):
        page = harness.http.get(address).text
        assert r"\u202e" in page
        assert "\u202e" not in page
        assert "\x1b" not in page
