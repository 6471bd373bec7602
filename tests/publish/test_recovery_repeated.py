"""A repeated run trains as the recorded one did, whatever the time and the memory of its machine would choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.reports import PROVENANCE
from helpers.trained_reports import trained, trained_report

from llmprune.publish.generated_windows import fetch_all_generated
from llmprune.publish.provenance import FILE, fetch_record, portable_figures
from llmprune.publish.reproduce import differences, recorded_recipe
from llmprune.recipe.recover import SelfGenerated

RECIPE = {"model": {"id": "org/base"}, "calibration": {"dataset": "org/text", "self_generated": 0}}


def published(folder: Path, recover: dict[str, Any], **figures: Any) -> str:
    """Write the record of a model that was trained, and return its folder."""
    recovery = trained({"web": 0.4}, after={"web": 0.2}, **figures)
    fields = {
        "format": 1, "created": "2026", "recipe": yaml.safe_dump(RECIPE | {"recover": recover}), "overrides": [],
        "cut": {}, "fingerprints": {}, "files": {}, "refused": None,
        "report": portable_figures(trained_report(recovery=recovery)),
    }  # fmt: skip
    (folder / FILE).write_text(json.dumps(fields))
    return str(folder)


def test_a_time_becomes_the_steps_that_it_was(tmp_path: Path) -> None:
    """60 steps of 2,048 tokens are repeated, and the 16 windows that the dense model wrote."""
    recipe, _ = recorded_recipe(published(tmp_path, {"hours": 2}))
    assert recipe.recover is not None
    assert (recipe.recover.hours, recipe.recover.tokens, recipe.recover.batch_tokens) == (None, 122_880, 2048)
    assert recipe.recover.data.self_generated == SelfGenerated(samples=16)
    assert recipe.recover.steps(122_880, 1024) == 60


@pytest.mark.parametrize("asked", ["auto", False, {"samples": 5}])
def test_tokens_and_windows_of_the_recipe_stay(tmp_path: Path, asked: object) -> None:
    """Only what the recipe left open is pinned; a model that wrote none for want of memory writes none again."""
    recover = {"tokens": "20M", "data": {"self_generated": asked}}
    recipe, _ = recorded_recipe(published(tmp_path, recover, sources=PROVENANCE.calibration_sources[:1]))
    assert recipe.recover is not None
    assert (recipe.recover.tokens, recipe.recover.batch_tokens) == (20_000_000, "auto")
    wanted = SelfGenerated(samples=5) if isinstance(asked, dict) else False
    assert recipe.recover.data.self_generated == wanted


def test_another_training_is_a_difference(tmp_path: Path) -> None:
    """Where weights differ, the saved step is compared; windows are fetched only if the record lists them."""
    record, _ = fetch_record(published(tmp_path, {"tokens": "20M"}))
    other = trained({"web": 0.4}, after={"web": 0.2}, best=1)
    found = differences(record, trained_report(recovery=other), model=tmp_path)
    assert "saved step of the training: 60 recorded, 30 now" in found
    assert fetch_all_generated(str(tmp_path), record) == {}
