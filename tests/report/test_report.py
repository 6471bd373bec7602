"""Report: lossless JSON, a self-contained page, and a summary within 80 columns."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest
from helpers.reports import (
    bare_report,
    gate,
    sample_layers,
    sample_report,
    summary,
    task,
    trained,
    trained_report,
)

from llmprune.report.html.page import render_page
from llmprune.results.evaluation_figures import Example, PerplexityFigures, Verdict
from llmprune.results.report_schema import GgufFigures, Report, RequantizedFigures


class PageOutline(HTMLParser):
    """Parser of a page that checks balanced tags, and collects headings and ids."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link", "wbr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.named_by: list[str] = []
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Ignore tags that close themselves."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the tag, its id and its labels."""
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        self.named_by += (values.get("aria-labelledby") or "").split()

    def handle_endtag(self, tag: str) -> None:
        """Check that the tag that was opened last is closed."""
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        """Record the text of section headings."""
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


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


@pytest.mark.parametrize(
    "figure",
    [
        "trained on 122,880 tokens",
        "All weights trained on the dense model",
        "in 60 steps of 2,048, learning rate up to 0.0003, 15 min 3 s, about 12.7 Wh.",
        "Held-out KL divergence 0.587 → 0.423 nats per token, mean of 3 sources; saved: the weights of step 60, the",
        "2 · code",
        "<td>0.830</td><td>0.710</td>",
        "105.2%<small>101.3–109.4%</small>",
        "<td>12 / 27</td>",
        "before the training: 26.31; trained: 21.94",
        "web: 0.410 to 0.260",
        "sampled from the dense model",
    ],
)
def test_the_page_shows_a_training(figure: str) -> None:
    """What was trained, the divergence of each source before and after, scores with intervals, and the text."""
    assert figure in render_page(trained_report())


def test_a_training_that_went_wrong_says_so() -> None:
    """Worse sources, setbacks and notes stand on the page and the terminal; without a gain the weights are the old."""
    unlike = {"web": 0.4, "code": 0.9}
    mixed = trained(unlike, after={"web": 0.2, "code": 1.1}, setbacks=2, notes=("the text was repeated 5 times",))
    useless = trained(unlike, after={"web": 0.6, "code": 1.1}, best=0)
    for said, recovery in (
        ("urther from the dense model than before the training: code (0.900 → 1.100)", mixed),
        ("he training diverged and returned to its last good weights 2 times", mixed),
        ("he text was repeated 5 times", mixed),
        ("o step came closer to the dense model", useless),
    ):
        report = trained_report(recovery=recovery, recovery_scores=None)
        for view in (render_page(report), summary(report)):
            assert said in " ".join(view.split())
    assert "further from" not in render_page(trained_report(recovery=useless))


@pytest.mark.parametrize("sources", [1, 9, 20])
@pytest.mark.parametrize("value", [0.0, 1e-9, 4e7, math.inf, math.nan])
def test_any_training_can_be_drawn(sources: int, value: float) -> None:
    """Lines of many sources, of broken figures and of one that is zero have coordinates within the page."""
    before = {f"source {number}": 0.3 + number / 7 for number in range(sources)}
    recovery = trained(before, after=before | {"source 0": value})
    page = render_page(trained_report(recovery=recovery))
    PageOutline(page)
    drawing = page.partition('id="recovery-title"')[2].partition("</svg></div>")[0]
    assert drawing.count("<polyline") == sources
    for place in re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|points)="([^"]*)"', drawing):
        assert "nan" not in place
        assert "inf" not in place


def test_a_training_without_steps_has_no_chart() -> None:
    """Where nothing was trained the section has the table alone."""
    first = trained({"web": 0.4}, after={"web": 0.4}, best=0)
    page = render_page(trained_report(recovery=first.model_copy(update={"checks": first.checks[:1], "steps": 0})))
    assert "recovery-title" not in page
    assert "<td>0.400</td><td>0.400</td>" in page


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


def test_the_summary_shows_dense_cut_and_pruned_in_80_columns() -> None:
    """One line per figure, each with its share of dense."""
    text = summary(sample_report())
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert {
        "dense cut pruned of dense",
        "parameters 134.5 M 106 M 78.8%",
        "weights 269 MB 212 MB 78.8%",
        "layers 30 27 90.0%",
        "MLP width 1,536 1,152 75.0%",
        "KV cache per token 23 KB 20.7 KB 90.0%",
        "perplexity 15.21 47.36 21.94 144.2%",
        "arc_easy (acc_norm) 0.586 0.544 92.8%",
        "mean retention 94.8%",
        "generated tokens/s 18.4 22.9 124.5%",
        "95% interval 92.1–97.4%",
        "Gate passed mean retention 94.8% (92.1–97.4%), required: at least 90.0%",
        "page smollm2-pruned/report.html",
    } <= rows
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


def test_the_summary_shows_a_training_in_80_columns() -> None:
    """Scores and perplexity before the training stand below those after it, and a table has every source."""
    text = summary(trained_report())
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert {
        "before the training 26.31 173.0%",
        "before the training 0.514 88.2%",
        "code 0.830 0.710 20.00 45.87 40.68",
        "before 106.1% (102.1–110.2%)",
    } <= rows
    assert max(map(len, text.splitlines())) <= 80
    assert "before the training" not in summary(sample_report())


def test_the_summary_of_a_bare_report_is_only_sizes() -> None:
    """There is no empty row and no column for a cut that was not measured."""
    lines = [" ".join(line.split()) for line in summary(bare_report()).splitlines()]
    assert "dense pruned of dense" in lines
    assert [line.split()[0] for line in lines if "%" in line] == ["parameters", "weights", "layers"]


def test_the_summary_names_a_gate_that_was_not_met_and_keeps_paths_whole() -> None:
    """A failed gate is described, square brackets are not markup, and a long path is not wrapped."""
    path = "/".join(["a-rather-long-folder-name"] * 5)
    report = sample_report(
        gate=gate(0.98, "fail"),
        warnings=("depth.layers: [bold]3[/bold] was given",),
        files={"model": path},
    )
    text = summary(report)
    assert "Gate not passed  mean retention 94.8% (92.1–97.4%), required: at least 98.0%" in text
    assert "[bold]3[/bold]" in text
    assert path in text


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
