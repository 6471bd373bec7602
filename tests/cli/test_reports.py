"""``llmprune report`` and ``compare``, and the files that commands write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import (
    command,
    copy_of,
    report_in,
)

from llmprune.common.errors import DiskError
from llmprune.common.files import write_text as write

pytestmark = pytest.mark.usefixtures("in_one_process")


def test_report_is_built_again(done: Path, tmp_path: Path) -> None:
    """``report`` writes the page from report.json, the same as the run did, and prints the table."""
    folder = copy_of(done, tmp_path)
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
        ('{"schema_version": 1}', "has schema 1, and this version of llmprune reads 4"),
        ('{"schema_version": 4, "created": 3}', "fields are wrong"),
    ],
)
def test_report_that_cannot_be_read(done: Path, tmp_path: Path, text: str | None, said: str) -> None:
    """A run that is not finished, a damaged report and another schema are errors of the input, with the remedy."""
    folder = copy_of(done, tmp_path)
    (folder / "report.json").unlink()
    if text is not None:
        (folder / "report.json").write_text(text)
    for verb in ("report", "compare"):
        outcome = command(verb, folder)
        assert (outcome.code, said in outcome.err) == (2, True), outcome.err


def test_a_family_has_no_report_of_its_own(tmp_path: Path) -> None:
    """A command that needs one run names a member's folder, not a run that would be unfinished."""
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "family.html").write_text("")
    for verb in ("report", "compare"):
        outcome = command(verb, tmp_path)
        assert (outcome.code, f"give one of them, such as {tmp_path / 'members' / '1'}" in outcome.err) == (2, True)


def test_runs_are_compared(done: Path, tmp_path: Path) -> None:
    """``compare`` prints a row a run, writes a page and JSON, and says what is not measured alike."""
    again = copy_of(done, tmp_path)
    assert (
        command("run", done.parent / "recipe.yaml", "--output", again, "--set", "evaluation.perplexity.samples=2").code
        == 0
    )
    outcome = command("compare", done, again, "--output", tmp_path / "compare.html")
    assert outcome.code == 0, outcome.err
    assert "done" in outcome.out
    assert "again" in outcome.out
    assert "evaluated with different settings" in outcome.out.replace("\n", " ")
    assert "2 runs compared" in (tmp_path / "compare.html").read_text()
    found = json.loads(command("compare", done, again, "--json").out)
    assert [row["run"] for row in found] == ["done", "again"]
    assert found[0]["size"] == pytest.approx(report_in(again)["pruned"]["bytes"] / report_in(again)["dense"]["bytes"])
    twice = command("compare", done, done)
    assert (twice.code, "named twice" in twice.err) == (2, True)


def test_compare_leaves_out_what_is_no_finished_run(done: Path, tmp_path: Path) -> None:
    """``compare runs/*`` names a service's folder, an unfinished run and a file, and compares the rest."""
    first, unfinished, service, stray = (tmp_path / name for name in ("first", "unfinished", "service", "notes.txt"))
    shutil.copytree(done, first)
    for folder in (unfinished, service):
        folder.mkdir()
    shutil.copy(first / "run.json", unfinished)
    stray.write_text("notes")
    outcome = command("compare", done, first, unfinished, service, stray, "--json")
    assert outcome.code == 0, outcome.err
    assert [row["run"] for row in json.loads(outcome.out)] == ["done", "first"]
    assert f"left out: {unfinished} has no report.json; the run is not finished" in outcome.err
    assert f"left out: {service} has no report.json; give the folder of a run" in outcome.err
    assert f"left out: {stray} cannot be read" in outcome.err
    alone = command("compare", first, service)
    assert (alone.code, "1 finished run in 2 folders" in alone.err, str(service) in alone.err) == (2, True, True)
    nowhere = command("compare", done, first, tmp_path / "nowhere")
    assert (nowhere.code, "does not exist" in nowhere.err) == (2, True)


@pytest.mark.parametrize(
    ("verb", "option"), [("compare", "--output"), ("report", "--output"), ("bench", "--output"), ("push", "--save")]
)
def test_an_output_that_cannot_be_written(
    done: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, option: str
) -> None:
    """A folder in a file's place, or a file in its folder's, is refused before anything is done; nothing is left."""
    run = done / "model" if verb == "bench" else done
    base = ["--against", workspace / "base"] if verb == "bench" else []
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for place, said in (
        ("folder", "is a folder; give a file, such as"),
        ("file/x.json", "its folder cannot be created"),
    ):
        outcome = command(verb, run, *base, option, tmp_path / place)
        assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_an_output_in_a_new_folder(done: Path, tmp_path: Path) -> None:
    """The folder of an output file is made."""
    assert command("compare", done, "-o", tmp_path / "new" / "page.html").code == 0
    assert (tmp_path / "new" / "page.html").is_file()


def test_a_write_that_fails_leaves_no_partial_file(tmp_path: Path) -> None:
    """The temporary file is deleted, and only a full disk gets the advice to free some space."""
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(DiskError, match=r"choose another --output$"):
        write(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
