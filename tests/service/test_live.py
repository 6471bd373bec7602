"""``llmprune serve`` in processes of its own, called by the commands, and killed while jobs run."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers.service import RECIPE, free_port, kill, recipe, served, settings_in, start, supervisor_of
from typer.testing import CliRunner

from llmprune.cli.main import app
from llmprune.common.errors import OutputError, RecipeError, ServiceError
from llmprune.service.client.sync.client import Client
from llmprune.service.planner.planner import Planner
from llmprune.service.server import serve
from llmprune.service.settings import Settings
from llmprune.service.supervisor.processes import processes_of_job


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Settings]]:
    """A running service with two slots."""
    with served(tmp_path_factory.mktemp("live"), slots=2) as running:
        yield running


def ask(live: tuple[Client, Settings], *arguments: str) -> tuple[int, str]:
    """Return exit code and output of a command that calls the service."""
    from llmprune.common.errors import LLMPruneError

    result = CliRunner().invoke(app, [*arguments, "--server", live[0].server])
    if isinstance(result.exception, LLMPruneError):  # main() prints these
        return result.exception.exit_code, str(result.exception)
    return result.exit_code, result.output


def test_submit_watch_list_fetch(live: tuple[Client, Settings], tmp_path: Path) -> None:
    """A job is submitted, watched, listed and fetched by the commands."""
    (tmp_path / "recipe.yaml").write_text(recipe(layers=3, pause=0.1))
    code, job = ask(live, "submit", str(tmp_path / "recipe.yaml"), "--name", "mine", "--set", "depth.remove=2")
    assert code == 0
    job = job.split()[-1]  # a busy machine is slow, and before it the command says whom it waits for
    code, said = ask(live, "watch", job)
    assert (code, "succeeded after" in said) == (0, True), said
    assert "mine" in ask(live, "jobs")[1]
    assert json.loads(ask(live, "jobs", "--json")[1])["jobs"][0]["id"] == job
    assert ask(live, "fetch", job, "--output", str(tmp_path / "out"))[0] == 0
    model = "model/model.safetensors"
    assert (tmp_path / "out" / model).read_bytes() == (live[1].run_folder(job) / model).read_bytes()
    assert ask(live, "fetch", job, "--only", "nothing.txt")[0] == 2
    assert live[0].job(job).refresh().overrides == ("depth.remove=2",)


def test_watch_ends_as_the_run_does(live: tuple[Client, Settings], tmp_path: Path) -> None:
    """``watch`` exits with the run's code, such as 3 for the gate; cancel and retry work as commands."""
    (tmp_path / "recipe.yaml").write_text(recipe(exit=3))
    assert ask(live, "submit", str(tmp_path / "recipe.yaml"), "--watch")[0] == 3
    (tmp_path / "slow.yaml").write_text(recipe(pause=60))
    job = ask(live, "submit", str(tmp_path / "slow.yaml"))[1].strip()
    assert ask(live, "cancel", job)[0] == 0
    assert ask(live, "watch", job)[0] == 1
    assert ask(live, "retry", job)[1].strip() == "queued"
    assert ask(live, "cancel", job)[0] == 0


def test_push_and_try_again(live: tuple[Client, Settings], tmp_path: Path) -> None:
    """A finished job is pushed with a token from a file; a failed push exits with 1, and its retry needs the token."""
    token = tmp_path / "token.txt"
    token.write_text("hf_of_this_push\n")
    job = live[0].submit(recipe(layers=1)).id
    assert ask(live, "watch", job)[0] == 0
    push = ("push-job", job, "--repo-id", "org/mine", "--public", "--hub-token-file", str(token))
    code, said = ask(live, *push)
    assert (code, "https://hub/org/mine/commit/c0ffee" in said) == (0, True), said
    bad = live[0].submit(recipe(push_exit=1)).id
    assert ask(live, "watch", bad)[0] == 0
    code, said = ask(live, "push-job", bad, "--repo-id", "org/mine", "--hub-token-file", str(token))
    assert (code, "the hub said no" in said) == (1, True), said
    failed = live[0].page(source=bad).jobs[0].id
    assert ask(live, "retry", failed)[0] == 2
    assert ask(live, "retry", failed, "--hub-token-file", str(token))[1].strip() == "queued"


def test_mistakes_are_reported_as_on_the_command_line(live: tuple[Client, Settings], tmp_path: Path) -> None:
    """A wrong recipe exits with 2 and every problem; a service that does not answer is reported with the remedy."""
    (tmp_path / "recipe.yaml").write_text("model: {id: /etc/passwd}\ncalibration: {dataset: org/x}\n")
    code, said = ask(live, "submit", str(tmp_path / "recipe.yaml"))
    assert (code, "not allowed here" in said) == (2, True)
    with pytest.raises(ServiceError, match="there is no job"):
        live[0].job("0" * 12)
    with pytest.raises(RecipeError, match="needs at least one of"):
        live[0].submit(RECIPE + "width: {}\n")
    with (
        Client("http://127.0.0.1:9", pause=lambda _: None) as nobody,
        pytest.raises(ServiceError, match="is llmprune serve running"),
    ):
        nobody.job("0" * 12)


def test_events_go_on_where_they_stopped(live: tuple[Client, Settings]) -> None:
    """Last-Event-ID continues with exactly the next event, and the stream ends with the job."""
    job = live[0].submit(recipe(layers=4, pause=0.6))
    events = list(job.events())
    assert [events[0].state, events[-1].state] == ["queued", "succeeded"]
    assert [event.fraction for event in events] == sorted(event.fraction for event in events)
    assert list(job.events(after=events[1].event_id)) == events[2:]


def test_submissions_at_once(live: tuple[Client, Settings]) -> None:
    """Concurrent submissions of many clients are queued once each, also those that are sent twice."""
    texts = [recipe(n=n) for n in range(24)]

    def send(part: list[str]) -> None:
        with Client(live[0].server) as client:
            for text in part:
                key = f"key {text}"[:40].replace("\n", " ")
                first, second = (client.submit(text, key=key) for _ in range(2))
                assert first.id == second.id

    threads = [threading.Thread(target=send, args=(texts[n::6],)) for n in range(6)]
    before = sum(live[0].page().counts.values())
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = live[0].page(limit=500)
    assert sum(found.counts.values()) == before + len(texts)
    sent = [live[0].job(job.id).refresh().recipe for job in found.jobs[: len(texts)]]
    assert sorted(sent) == sorted(texts)
    for job in live[0].jobs():
        with contextlib.suppress(ServiceError):
            job.cancel()


def test_only_one_service_on_a_folder(live: tuple[Client, Settings]) -> None:
    """A second service on the same data folder is refused before it changes anything."""
    with pytest.raises(OutputError, match="another llmprune serve"):
        serve(live[1].model_copy(update={"port": free_port()}))


def test_kills_lose_no_job(tmp_path: Path) -> None:
    """SIGKILL of the supervisor, then of the service with it: the job runs on, is found again, and runs once."""
    settings = settings_in(tmp_path, port=free_port())
    process = start(settings)
    try:
        with Client(f"http://127.0.0.1:{settings.port}") as client:
            job = client.submit(recipe(layers=30, pause=0.5)).id
            wait_for(lambda: client.job(job).shown.total is not None)
            (first,) = [
                one.pid for one in processes_of_job(job) if "llmprune.service.supervisor.job_runner" in one.cmdline()
            ]
            old = supervisor_of(process.pid)
            kill(old)
            wait_for(lambda: supervisor_of(process.pid) not in (None, old))
            kill(process.pid)
            process.wait()
            process = start(settings)
            assert client.job(job).state == "running"
            assert first in [one.pid for one in processes_of_job(job)]
            (*_, last) = client.job(job).events()
        assert (last.state, last.attempts) == ("succeeded", 1)
        assert not (settings.run_folder(job) / "TWICE").exists()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(one.info["cmdline"])] == []


def test_sigterm_stops_the_service_and_its_jobs(tmp_path: Path) -> None:
    """A stopped service leaves no process; its job is queued again and continues with the next service."""
    settings = settings_in(tmp_path, port=free_port())
    process = start(settings)
    with Client(f"http://127.0.0.1:{settings.port}") as client:
        job = client.submit(recipe(layers=4, pause=0.4)).id
        wait_for(lambda: client.job(job).shown.total is not None)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert processes_of_job(job) == []
        process = start(settings)
        (*_, last) = client.job(job).events()
    assert (last.state, last.attempts) == ("succeeded", 2)
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def test_service_imports_no_torch(live: tuple[Client, Settings]) -> None:
    """Neither the HTTP process nor the supervisor has torch or transformers in its memory."""
    program = (
        "import sys, llmprune.service.api.app, llmprune.service.supervisor.__main__, llmprune.service.server\n"
        "print(*sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


def wait_for(reached: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_idle_plan_worker_ends_and_another_answers_later(tmp_path: Path) -> None:
    """The worker ends after a while without requests, and the next request starts another one."""
    echo = (sys.executable, "-c", "import sys\nfor line in sys.stdin: print(line, end='', flush=True)")
    planner = Planner(tmp_path, echo, idle=0.3)
    assert planner.plan("a", (), caller="ann")["recipe"] == "a"
    worker = planner._worker
    assert worker is not None
    assert worker.wait(10) is not None
    assert planner.plan("b", (), caller="ann")["recipe"] == "b"
    planner.close()
