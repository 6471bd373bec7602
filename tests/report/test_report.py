"""Report: lossless JSON and a self-contained page."""

from __future__ import annotations

import math
import re

import pytest
from helpers.page_outline import PageOutline
from helpers.reports import bare_report, gate, sample_layers, sample_report, summary, task
from helpers.trained_reports import trained_report

from llmprune.report.html.page import render_page
from llmprune.results.figures.evaluation import Example, PerplexityFigures, Verdict
from llmprune.results.figures.result_files import GgufFigures, RequantizedFigures
from llmprune.results.report_schema import Report


@pytest.mark.parametrize("report", [sample_report(), bare_report(), trained_report()], ids=["full", "bare", "trained"])
def test_a_report_read_back_from_its_json_is_the_same_report(report: Report) -> None:
    """``report.json`` is lossless."""
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_the_page_of_a_full_report_has_every_section() -> None:
    """Every part of a report has a section on the page, warnings first."""
    outline = PageOutline(render_page(sample_report()))
    assert outline.headings == [
        "Warnings",
        "Size",
        "Layers",
        "Tasks",
        "Generated answers",
        "Perplexity",
        "Generation speed",
        "Verification",
        "Steps",
        "Calibration text",
        "Recipe",
        "Provenance",
        "Files",
    ]


@pytest.mark.parametrize(
    "figure",
    [
        "−21.2%",
        "269 MB → 212 MB",
        "1.24×",
        "94.8%",
        "92.1–97.4%",
        "0.012",
        "500 samples of 2,376",
        "0.061",
        "86.1%",
        "Not in the mean: squad_completion.",
        "a unit of the army",
        "23 KB",
        "Gate passed.",
        "3 of 30 layers removed",
        "Removed: 12, 20, 21.",
        "47.36",
        "equal to the last bit",
        "3 min 13 s",
        "14 min 47 s",
        "<td>3 min</td>",
        "3 GB",
        "2 processes",
        "8 windows at a time",
        "refit.ridge=0.02",
        "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        "smollm2-pruned/report.html",
    ],
)
def test_the_page_shows_the_figures(figure: str) -> None:
    """Sizes, ratios, removed layers, verdict, times and provenance are text on the page."""
    assert figure in render_page(sample_report())


def test_the_page_needs_no_network() -> None:
    """The page has no address, script or further file, so it can be mailed."""
    page = render_page(sample_report())
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "<link" not in page
    assert "@import" not in page
    assert not re.search(r"""src=["']?(?!data:)""", page)
    assert not re.search(r"url\((?!#)", page)


def test_text_of_the_user_is_escaped() -> None:
    """Markup in a recipe, task or path is escaped."""
    attack = '</pre><script>alert(1)</script>"><img src=x onerror=alert(1)>'
    base = sample_report()
    report = sample_report(
        recipe_text=attack,
        overrides=(attack,),
        warnings=(attack,),
        files={attack: attack},
        provenance=base.provenance.model_copy(update={"model": attack, "device": attack}),
        perplexity=base.perplexity.model_copy(update={"source": attack}) if base.perplexity else None,
        tasks=(task(attack, attack, dense=0.5, pruned=0.4, flips=(1, 1)),),
        generation=base.generation.model_copy(
            update={"examples": (Example(prompt=attack, dense=attack, pruned=attack),)}
        )
        if base.generation
        else None,
    )
    page = render_page(report)
    PageOutline(page)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page


def test_page_and_summary_show_other_forms_of_the_result() -> None:
    """The quantized result has its format, size and divergence; a GGUF file its size. Only one of them is enough."""
    again = RequantizedFigures(format="fp8 (blocks of 128 × 128)", weights=189, bytes=120_000_000, divergence=0.00123)
    file = GgufFigures(kind="Q8_0", file="gguf/model-Q8_0.gguf", bytes=110_000_000)
    page = render_page(sample_report(requantized=again, gguf=(file,)))
    for part in (again.format, "120 MB", "56.6%", "0.00123", "189 weight matrices", "GGUF Q8_0", "110 MB"):
        assert part in page
    assert "weight matrices" not in render_page(sample_report(gguf=(file,)))
    assert "Other forms of the result" in PageOutline(page).headings
    text = " ".join(summary(sample_report(requantized=again)).split())
    assert "Quantized fp8 (blocks of 128 × 128) in 189 weight matrices, 120 MB; KL divergence" in text


def test_a_bare_page_has_no_empty_sections() -> None:
    """Only size, verification, recipe and provenance are always present."""
    page = render_page(bare_report())
    assert PageOutline(page).headings == ["Size", "Verification", "Recipe", "Provenance"]
    assert "None" not in page


@pytest.mark.parametrize("field", ["importance", "error_cut", "error_refit", "score_share", "width", "kept"])
def test_a_missing_layer_figure_has_no_chart_or_column(field: str) -> None:
    """A chart or column without data is omitted; the others remain."""
    layers = tuple(layer.model_copy(update={field: None}) for layer in sample_layers())
    page = render_page(sample_report(layers=layers))
    PageOutline(page)
    assert ('id="importance-title"' in page) == (field != "importance")
    assert 'id="error-title"' in page
    assert "None" not in page


def test_a_cut_without_refit_shows_one_perplexity_bar_less() -> None:
    """Without a refit, the pruned model is the cut model."""
    perplexity = PerplexityFigures(dense=15.2, cut=None, pruned=47.4, tokens=4096, source="held-out.txt")
    page = render_page(sample_report(perplexity=perplexity))
    assert "cut and refit" not in page
    assert "dense: 15.2; pruned: 47.4" in page


@pytest.mark.parametrize("count", [1, 2, 30, 126])
def test_the_page_draws_any_number_of_layers(count: int) -> None:
    """One bar per layer, removed layers hatched, unique ids, every label defined."""
    removed = tuple(layer for layer in range(count) if layer % 3 == 1)
    page = render_page(sample_report(layers=sample_layers(count, removed)))
    outline = PageOutline(page)
    assert len(re.findall(r'<rect class="(?:kept|cut)"[^>]*><title>Layer', page)) == count
    assert page.count('<rect class="ground"') == 2 * len(removed)
    assert len(set(outline.ids)) == len(outline.ids)
    assert set(outline.named_by) <= set(outline.ids)


@pytest.mark.parametrize("value", [0.0, -0.3, 1e-9, 4e7, math.inf, math.nan])
def test_extreme_figures_can_be_drawn(value: float) -> None:
    """Zero, negative, tiny, huge and infinite figures and NaN, as a broken model has them, are drawn."""
    layers = tuple(
        layer.model_copy(update={"importance": value, "error_cut": value, "error_refit": value})
        if layer.layer % 2
        else layer
        for layer in sample_layers()
    )
    perplexity = PerplexityFigures(dense=15.2, cut=value, pruned=value, tokens=4096, source="held-out.txt")
    page = render_page(sample_report(layers=layers, perplexity=perplexity))
    PageOutline(page)
    for place in re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width|height|points)="([^"]*)"', page):
        assert "nan" not in place
        assert "inf" not in place


def test_the_mean_of_one_task_is_not_drawn_twice() -> None:
    """A single task is drawn once, with the gate's mark; several are below their mean."""
    base = sample_report()
    assert base.retention is not None
    alone = sample_report(
        tasks=base.tasks[:1], retention=base.retention.model_copy(update={"counted": ("arc_easy",), "left_out": ()})
    )
    for report, dots, mean in ((base, 4, True), (alone, 1, False)):
        drawing = render_page(report).partition('id="retention-title"')[2].partition("</svg>")[0]
        assert drawing.count("<circle") == dots
        assert (">mean</text>" in drawing) == mean
        assert drawing.count('class="bar"') == 1


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("fail", "Gate not passed."),
        ("not enough samples", "about 2,400 are needed"),
        ("no interval", "not a mean over samples"),
    ],
)
def test_the_page_shows_every_verdict(verdict: Verdict, said: str) -> None:
    """Failed and undecided gates are described, with the samples needed."""
    assert said in render_page(sample_report(gate=gate(0.96, verdict, needed=2400)))
