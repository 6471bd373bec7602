"""No path of the server reaches a client, in errors, logs, plans, jobs, reports or pages."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.service import RECIPE, YAML, ServiceHarness, recipe

from llmprune.service.api.access.server_paths import _STEP, ServerPaths
from llmprune.service.settings import Settings

HTML = {"Accept": "text/html"}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Folders for --allow-root and --allow-tasks."""
    for name in ("root/model", "tasks"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "root" / "text.txt").write_text("text")
    return tmp_path


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("see {data}/jobs/0123456789ab/run/report.html", "see run/report.html"),
        ("the file {root}/a b/text.txt is empty", "the file a b/text.txt is empty"),
        ("the folder {root} is empty", "the folder …/root is empty"),
        ("looked in {data}/nowhere); check", "looked in …/nowhere); check"),
        ("{tasks} and {tasks}/x.yaml", "tasks and tasks/x.yaml"),
        ('  File "/usr/lib/python3/dist-packages/x.py", line 3', '  File "…/x.py", line 3'),
        ("https://hub.co/org/name, a/b/c, POST /v1/jobs/x", "https://hub.co/org/name, a/b/c, POST /v1/jobs/x"),
        ("read/write, 1/2 and/or", "read/write, 1/2 and/or"),
        ("file:///srv/data/x.json", "file://…/x.json"),
        ("LD=/opt/a/lib:/opt/b/lib, in:/srv/x.py, gcc -I/opt/c/include", "LD=…/lib:…/lib, in:…/x.py, gcc -I…/include"),
        ("{data}/hub-home/models/x and {data}", "…/x and …/its data"),
        ("https://hub.co{root}/a, org{root}/a and org{tasks}", "https://hub.co{root}/a, org{root}/a and org{tasks}"),
    ],
)  # fmt: skip
def test_paths_become_relative(folders: Path, said: str, shown: str) -> None:
    """A path becomes relative to the job or root, the name of a task folder, or its last part; URLs are unchanged."""
    data = folders / "its data"
    settings = Settings(data_dir=data, allow_roots=(folders / "root",), allow_tasks=(folders / "tasks",))
    text = said.format(data=data, root=folders / "root", tasks=folders / "tasks")
    assert ServerPaths.of(settings).hide(text) == shown.format(root=folders / "root", tasks=folders / "tasks")


def test_logs_are_renamed_wherever_a_part_ends(tmp_path: Path) -> None:
    """Parts of any size join to the same text: no path is cut in two, and offsets are those of the file."""
    harness = ServiceHarness(tmp_path)
    path = harness.settings.data_dir / "jobs" / "0123456789ab" / "run" / "x.json"
    job = harness.submit(recipe(say=f"begin {path} middle {path} end"))["id"]
    harness.until_ended(job)
    from llmprune.service.api.files.outputs import read_log

    for size in (1, 7, 50, 10_000):
        parts, offset = b"", 0
        while (found := read_log(harness.service, job, offset=offset, size=size))[1] > offset:
            parts, offset = parts + found[0], found[1]
        assert parts == b"begin run/x.json middle run/x.json end\n", size
        assert offset == harness.settings.log(job).stat().st_size


def test_a_large_log_is_searched_in_steps(tmp_path: Path) -> None:
    """Each search reads at most one step, and a path across the border of two steps is found."""
    paths = ServerPaths.of(Settings(data_dir=tmp_path))
    for before in range(_STEP - 40, _STEP + 5):
        data = b" /" * (before // 2) + b" " * (before % 2) + b" /opt/secret/place/x.py " + b"a" * _STEP
        assert paths.hide_between(data, 0, end=len(data)) == data.replace(b"/opt/secret/place", "…".encode())
    searched: list[int] = []

    class Pattern:
        def search(self, data: bytes, begin: int, end: int) -> re.Match[bytes] | None:
            searched.append(end - begin)
            return paths.data.search(data, begin, end)

    data = b" /a" * _STEP
    watched = dataclasses.replace(paths, data=Pattern())  # type: ignore[arg-type]  # what is used of a pattern
    assert watched.hide_between(data, 0, end=len(data)) == data
    assert max(searched) <= _STEP


def test_nothing_that_goes_out_names_a_folder(folders: Path) -> None:
    """Jobs, events, lists, logs, reports, files, pages, plans and refusals, of jobs that end well and badly."""
    planner = Answers()
    harness = ServiceHarness(folders, planner, allow_roots=(folders / "root",), allow_tasks=(folders / "tasks",))  # type: ignore[arg-type]  # what the service uses of a planner
    sections = "model: {id: model}\ncalibration: {dataset: text.txt}\nevaluation: {include_path: tasks}\n"
    secret = str(folders)
    texts = [
        recipe(say="HERE/x/y.py", page="HERE/root/z", crash="HERE/a/b.bin", exit=code).replace(RECIPE, sections)
        for code in (0, 1, 3)
    ]
    jobs = [harness.submit(text)["id"] for text in texts]
    shown: list[str] = []
    for job in jobs:
        harness.until_ended(job)
        for name in ("plan.json", "run.json", "evaluation.json"):
            (harness.run_folder(job) / name).write_text(f'{{"model": "{secret}/root/model"}}')
        places = ["", "/log", "/artifacts", "/artifacts/report.json", "/artifacts/report.html", "/artifacts/plan.json",
                  "/artifacts/run.json", "/artifacts/evaluation.json",
                  "/report", "/report.html", "/events"]  # fmt: skip
        answers = [harness.http.get(f"/v1/jobs/{job}{place}") for place in places]
        answers.append(harness.http.get(f"/jobs/{job}", headers=HTML))
        shown += [answer.text for answer in answers]
        sizes = {one["name"]: one["bytes"] for one in harness.http.get(f"/v1/jobs/{job}/artifacts").json()}
        for name, size in sizes.items():
            assert len(harness.http.get(f"/v1/jobs/{job}/artifacts/{name}").content) == size
    planner.answer = {"problems": [f"the data file {secret}/root/text.txt is empty"]}
    shown += [harness.http.post("/v1/recipes/plan", content=sections, headers=YAML).text]
    planner.answer = {"plan": {"model": f"{secret}/root/model", "notes": [f"from {secret}/tasks"]}}
    shown += [harness.http.post("/v1/recipes/plan", content=sections, headers=YAML).text]
    wrong = sections.replace("id: model", f"id: {secret}/x/y")
    shown += [
        harness.http.post(f"/v1/{place}", content=wrong, headers=YAML).text for place in ("jobs", "recipes/validate")
    ]
    shown += [harness.http.get(place, headers=HTML).text for place in ("/", "/submit", f"/now?job={jobs[1]}")]
    shown += [harness.http.get(f"/jobs/{job}/live", headers=HTML).text for job in jobs]
    shown.append(harness.http.get("/v1/jobs").text)
    assert [text for text in shown if secret in text] == []
    assert any("text.txt is empty" in text for text in shown)


class Answers:
    """A planner whose answer a test sets."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {"problems": []}

    def plan(self, recipe: str, overrides: Any, *, caller: str, wrong: Any = ()) -> dict[str, Any]:
        """Return the answer that was set."""
        return self.answer
