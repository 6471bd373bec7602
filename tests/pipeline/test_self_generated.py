"""Calibration windows that the dense model writes itself: in the report, in the run folder, and after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import command, report_in, save_model, verify_here, write_recipe, write_text
from safetensors.torch import load_file

FILE = "self-generated.safetensors"


def test_the_model_writes_some_of_its_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated windows come in addition, as a source of their own, differ from each other, and are written once."""
    verify_here(monkeypatch)
    text = write_text(tmp_path / "text.txt")
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        save_model(tmp_path / "dense"),
        text,
        calibration={
            "dataset": str(text),
            "samples": 6,
            "sequence_length": 32,
            "self_generated": 3,
            "combine": "worst",
        },
        evaluation={},
    )
    done = command("run", recipe, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    report = report_in(tmp_path / "run")
    sources = report["provenance"]["calibration_sources"]
    assert [(source["name"], source["windows"]) for source in sources] == [(str(text), 6), ("self_generated", 3)]
    assert report["sources"]["names"] == [str(text), "self_generated"]
    assert report["provenance"]["calibration_tokens"] == 9 * 32
    windows_NL = load_file(tmp_path / "run" / FILE)["windows"]
    assert windows_NL.shape == (3, 32)
    assert len(torch.unique(windows_NL, dim=0)) == 3
    before = (tmp_path / "run" / FILE).stat().st_mtime_ns
    assert command("run", recipe, "--output", tmp_path / "run").code == 0
    steps = {step["name"]: step["reused"] for step in report_in(tmp_path / "run")["steps"]}
    assert steps["self-generated windows"]
    assert (tmp_path / "run" / FILE).stat().st_mtime_ns == before


def test_by_default_the_model_writes_a_quarter_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan says so, and the run writes them; where no device holds the whole model there are none, with a note."""
    verify_here(monkeypatch)
    text = write_text(tmp_path / "text.txt")
    calibration = {"dataset": str(text), "samples": 8, "sequence_length": 32, "self_generated": "auto"}
    base = save_model(tmp_path / "dense")
    recipe = write_recipe(tmp_path / "recipe.yaml", base, text, calibration=calibration)
    planned = command("plan", recipe, "--json")
    assert json.loads(planned.out)["calibration"] == [10, 32]
    assert command("run", recipe, "--output", tmp_path / "run").code == 0
    assert load_file(tmp_path / "run" / FILE)["windows"].shape == (2, 32)
    model = {"id": str(base), "max_memory": {"cpu": "1KB"}, "device_map": "auto"}
    large = command(
        "plan", write_recipe(tmp_path / "large.yaml", base, text, calibration=calibration, model=model), "--json"
    )
    assert json.loads(large.out)["calibration"] == [8, 32]
    assert "writes no calibration windows itself" in " ".join(json.loads(large.out)["notes"])


def test_a_run_keeps_its_windows_where_memory_got_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` decides once: a run that is repeated with too little memory for the model reuses all its products."""
    verify_here(monkeypatch)
    text, model = write_text(tmp_path / "text.txt"), save_model(tmp_path / "dense")
    settings = {"dataset": str(text), "samples": 8, "sequence_length": 32, "self_generated": "auto"}

    def run(*options: str, **model_keys: object) -> dict[str, bool]:
        named = {"id": str(model)} | model_keys
        recipe = write_recipe(tmp_path / "recipe.yaml", model, text, calibration=settings, model=named)
        done = command("run", recipe, "--output", tmp_path / "run", *options)
        assert done.code == 0, done.err
        return {step["name"]: step["reused"] for step in report_in(tmp_path / "run")["steps"]}

    assert not run()["self-generated windows"]
    short = {"max_memory": {"cpu": "10KB"}}
    assert all(
        reused for name, reused in run(**short).items() if name in ("self-generated windows", "pass 1", "pass 2")
    )
    assert "self-generated windows" not in run("--fresh", **short)
    run()
    assert "writes no calibration windows itself" in " ".join(report_in(tmp_path / "run")["warnings"])
