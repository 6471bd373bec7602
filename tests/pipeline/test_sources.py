"""Runs on several sources of text: scores combined, and the report of their agreement."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import report_in, reused_steps, save_model, verify_here, write_text
from helpers.recipes import problems
from safetensors.torch import save_file

from llmprune import Recipe, run
from llmprune.common.errors import CalibrationError, OutputError, RecipeError
from llmprune.planning.plan import plan_and_check
from llmprune.results.sentences.stability import describe_sources
from llmprune.score.scores import Scores
from llmprune.testing import VOCABULARY

CUTS: dict[str, Any] = {
    "depth": {"remove": 1, "criterion": {"kind": "block_influence"}},
    "width": {"neurons": 64},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers, and two texts of different kinds."""
    folder = tmp_path_factory.mktemp("sources")
    save_model(folder / "base")
    write_text(folder / "prose.txt")
    (folder / "numbers.txt").write_text("\n\n".join(" ".join(str(n * k) for k in range(40)) for n in range(100)))
    return folder


def _recipe(base: Path, *, combine: str = "pooled", **sections: Any) -> dict[str, Any]:
    sources = [{"dataset": str(base / name)} for name in ("prose.txt", "numbers.txt")]
    shape = {"samples": 6, "sequence_length": 32, "self_generated": 0}
    calibration = {"sources": sources, "combine": combine, **shape}
    given = {"calibration": calibration, "evaluation": {"generation": False}} | sections
    return {"model": {"id": str(base / "base")}, **given}


def _run(base: Path, output: Path, *, combine: str, **options: bool) -> dict[str, Any]:
    run(Recipe.model_validate(_recipe(base, combine=combine, **CUTS)), output, **options)
    return report_in(output)


def _run_on(base: Path, output: Path, *, calibration: dict[str, Any]) -> None:
    run(Recipe.model_validate(_recipe(base, calibration=calibration, **CUTS)), output)


def test_combined_scores_say_how_far_the_sources_agree(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has the agreement without an option, also where an earlier run's scores are used again."""
    verify_here(monkeypatch)
    report = _run(base, tmp_path / "run", combine="worst")
    found = report["sources"]
    assert found["windows"] == [3, 3]
    assert [len(removed) for removed in found["removed_layers"]] == [1, 1]
    kept = [layer["layer"] for layer in report["layers"] if not layer["removed"]]
    assert [layer for layer, share in enumerate(found["neurons"]) if share is not None] == kept
    assert all(0 < found["neurons"][layer] <= 1 for layer in kept)
    assert all(layer["score_share"] is None for layer in report["layers"])  # ranks do not add up
    assert len(Scores.load(tmp_path / "run" / "scores.safetensors").by_source) == 2
    assert "kept by every source" in (tmp_path / "run" / "report.html").read_text()
    assert _run(base, tmp_path / "run", combine="worst")["sources"] == found
    assert reused_steps(tmp_path / "run")["pass 1"]
    with pytest.raises(OutputError, match=r"calibration.combine: 'worst' in the folder, 'rank_mean'"):
        _run(base, tmp_path / "run", combine="rank_mean")
    shutil.rmtree(tmp_path / "run" / "model")
    _run(base, tmp_path / "run", combine="rank_mean")
    assert not reused_steps(tmp_path / "run")["pass 1"]


def test_the_calibration_check_compares_sources(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several sources it compares them, not halves, and leaves the pooled cut as it is."""
    verify_here(monkeypatch)
    plain = _run(base, tmp_path / "run", combine="pooled")
    cut = json.loads((tmp_path / "run" / "cut.json").read_text())
    checked = _run(base, tmp_path / "run", combine="pooled", calibration_check=True)
    assert plain["sources"] is None
    assert checked["sources"] is not None
    assert checked["stability"] is None
    assert checked["layers"] == plain["layers"]
    assert json.loads((tmp_path / "run" / "cut.json").read_text()) == cut


def test_other_sources_of_the_same_tokens_are_another_recipe(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pooled scores are those of all tokens; the repairs are judged on sources that their solution has not seen."""
    verify_here(monkeypatch)
    windows_NL = torch.randint(3, VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(0))
    kinds = {"halves": torch.tensor([0, 0, 0, 1, 1, 1]), "thirds": torch.tensor([0, 1, 2, 0, 1, 2])}
    save_file({"windows": windows_NL, **kinds}, tmp_path / "tokens.safetensors")
    tokens = {"tokens": str(tmp_path / "tokens.safetensors"), "key": "windows"}
    for expected in (False, True):
        _run_on(base, tmp_path / "run", calibration=tokens | {"source_key": "halves"})
        assert reused_steps(tmp_path / "run")["pass 2"] == expected
    with pytest.raises(OutputError, match=r"calibration.source_key: 'halves' in the folder, 'thirds'"):
        _run_on(base, tmp_path / "run", calibration=tokens | {"source_key": "thirds"})
    shutil.rmtree(tmp_path / "run" / "model")
    _run_on(base, tmp_path / "run", calibration=tokens | {"source_key": "thirds"})
    assert reused_steps(tmp_path / "run")["pass 1"]


@pytest.mark.parametrize("sections", [{}, {"width": {"neurons": 64}}])
def test_the_calibration_check_ablates_no_layers_by_source(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    """Neurons are compared by source; where only ablated layers are scored, halves of the windows are compared."""
    verify_here(monkeypatch)
    depth = {"remove": 1, "criterion": {"kind": "perplexity", "windows": 1}}
    run(Recipe.model_validate(_recipe(base, depth=depth, **sections)), tmp_path / "run", calibration_check=True)
    report = report_in(tmp_path / "run")
    assert bool(report["sources"]) == bool(sections)
    assert bool(report["stability"]) != bool(sections)


def test_ablation_that_lacks_a_source_is_refused_before_the_run(base: Path) -> None:
    """A plan finds that the windows of the criterion have none of a source."""
    depth = {"remove": 1, "criterion": {"kind": "perplexity", "windows": 1}}
    with pytest.raises(CalibrationError, match=r"1 of 6 calibration windows, which have none of 1 of its 2 sources"):
        plan_and_check(Recipe.model_validate(_recipe(base, combine="worst", depth=depth))).require()


def test_ready_tokens_of_a_single_source_cannot_be_combined(base: Path, tmp_path: Path) -> None:
    """A plan, which reads the file, says so."""
    tokens = {"tokens": str(tmp_path / "tokens.safetensors"), "key": "windows", "source_key": "kind"}
    windows_NL = torch.arange(4 * 32).reshape(4, 32) % VOCABULARY
    save_file({"windows": windows_NL, "kind": torch.zeros(4, dtype=torch.int64)}, tokens["tokens"])
    values = {"model": {"id": str(base / "base")}, "calibration": tokens | {"combine": "worst", "self_generated": 0}}
    with pytest.raises(RecipeError, match="calibration: combine: worst needs several sources"):
        plan_and_check(Recipe.model_validate(values | {"width": {"neurons": 64}})).require()


def test_a_single_source_cannot_be_combined() -> None:
    """The recipe says so before anything happens."""
    found = problems(
        "{model: {id: x}, calibration: {dataset: y, self_generated: 0, combine: worst}, width: {mlp: 0.5}}"
    )
    assert found == ["calibration: combine: worst needs several sources of text; list them, or remove combine"]


def test_sentences_name_the_layers_that_each_source_would_remove() -> None:
    """Sources that agree are named together."""
    from llmprune.results.figures.stability import SourceFigures

    found = SourceFigures(
        names=("news", "code", "talk"),
        windows=(2, 2, 2),
        removed_layers=((3,), (4,), (3,)),
        neurons=(None, 0.5, 0.75),
        heads=(),
        experts=(),
    )
    assert describe_sources(found) == [
        "of the neurons that are kept, 62.5% would be kept by each source of text alone too "
        "(minimum: 50.0%, in layer 1)",
        "removed by one source alone: layers 3 by news and talk, layers 4 by code",
    ]
