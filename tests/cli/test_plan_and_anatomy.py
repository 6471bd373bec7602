"""``llmprune plan`` and ``llmprune anatomy``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import (
    LAYERS,
    command,
    report_in,
    write_recipe,
)

from llmprune.testing import tiny_config

pytestmark = pytest.mark.usefixtures("in_one_process")


def test_set_overrides_the_recipe(done: Path, tmp_path: Path) -> None:
    """``--set`` changes keys, adds sections, and may be repeated."""
    arguments = ["--set", "depth.remove=1", "--set", "width=null", "--json"]
    plan = json.loads(command("plan", done.parent / "recipe.yaml", *arguments).out)
    assert (plan["keep_layers"], plan["pruned"]["widths"]) == (LAYERS - 1, {"intermediate_size": 96})


def test_plan_is_for_people_and_machines(done: Path) -> None:
    """``plan`` prints a table; with ``--json`` the same as one JSON object, the one that a run keeps."""
    table = command("plan", done.parent / "recipe.yaml")
    assert table.code == 0
    assert "Layers: 2 to be removed" in table.out
    assert f"{report_in(done)['dense']['parameters']:,}" in table.out
    plan = json.loads(command("plan", done.parent / "recipe.yaml", "--json").out)
    kept = json.loads((done / "plan.json").read_text())
    for one in (plan, kept):  # these are of the machine at this moment
        assert one.pop("devices")
        one.pop("durations")
    assert plan == kept


def test_plan_and_anatomy_need_only_a_config(workspace: Path, tmp_path: Path) -> None:
    """A folder with nothing but ``config.json`` can be planned and looked at."""
    (tmp_path / "bare").mkdir()
    shutil.copy(workspace / "base" / "config.json", tmp_path / "bare")
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "bare", workspace / "text.txt")
    assert json.loads(command("plan", recipe, "--json").out)["dense"]["layers"] == LAYERS
    found = json.loads(command("anatomy", tmp_path / "bare", "--json").out)
    assert found["num_layers"] == LAYERS
    assert found["groups"] == [{"field": "intermediate_size", "width": 96, "refusal": None}]
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {"config.json"}


def test_anatomy_says_what_can_be_cut(workspace: Path) -> None:
    """``anatomy`` names the layers, the neurons with their proof, and both verdicts."""
    outcome = command("anatomy", f"{workspace / 'base'}/")
    assert outcome.code == 0
    for said in ("4 × LlamaDecoderLayer", "96 in 4 layers", "intermediate_size", "Depth: can be cut", "Width: can be"):
        assert said in outcome.out


def test_anatomy_says_why_not(tmp_path: Path) -> None:
    """A width that no config field sets is refused with the reason, in the table and in JSON."""
    tiny_config("bloom").save_pretrained(tmp_path)
    assert "Width: cannot be cut: " in command("anatomy", tmp_path).out
    found = json.loads(command("anatomy", tmp_path, "--json").out)
    assert found["depth_refusal"] is None
    assert "no config field sets the width of an MLP" in found["width_refusal"]
