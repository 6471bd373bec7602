"""Time left of a job's run, from the file that the run writes to what people read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmprune.service.cli.terminal import doing
from llmprune.service.supervisor.progress import PROGRESS, read_progress

REPORTED = {"step": "pass 2: cut and refit", "done": 12, "total": 28, "seconds": 30.0}


def _read(folder: Path, **more: Any) -> dict[str, Any]:
    (folder / PROGRESS).write_text(json.dumps(REPORTED | more))
    return read_progress(folder, 0.4)


@pytest.mark.parametrize("left", [720.0, None])
def test_the_time_left_of_the_run_is_shown(left: float | None, tmp_path: Path) -> None:
    """The job has the time left of its step and of the whole run; a run that cannot tell says nothing of the latter."""
    job = _read(tmp_path, run_seconds_left=left)
    assert (job["seconds_left"], job["run_seconds_left"]) == (40.0, left)
    said = "pass 2: cut and refit, layer 13 of 28, about 40 s left in this step"
    assert doing(job | {"state": "running"}) == said + (", about 12 min left in all" if left else "")


def test_a_run_of_an_older_version_or_a_wrong_value_is_no_error(tmp_path: Path) -> None:
    """A file without the field is read; one with a negative time is not believed at all."""
    assert _read(tmp_path)["run_seconds_left"] is None
    assert _read(tmp_path, run_seconds_left=-1.0) == {}


def test_a_training_shows_how_it_stands(tmp_path: Path) -> None:
    """It counts steps, and its words stand beside them."""
    words = "1,024 tokens, loss 0.412, held-out divergence 0.310 (0.620 at first)"
    job = _read(tmp_path, step="recovery: training", detail=words)
    assert job["detail"] == words
    assert doing(job | {"state": "running"}).startswith(f"recovery: training, step 13 of 28, {words}, about 40 s left")
    assert _read(tmp_path)["detail"] is None
