"""The report: a value that survives its JSON, a page that stands alone, a table for 80 columns."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from llmprune.report.html.page import render_page
from llmprune.report.run_table import print_summary
from llmprune.results.schema import (
    BarFigures,
    DivergenceFigures,
    Example,
    FreeText,
    GateFigures,
    GenerationFigures,
    Interval,
    LayerFigures,
    PerplexityFigures,
    Provenance,
    Report,
    RetentionFigures,
    Size,
    SpeedFigures,
    Step,
    TaskFigures,
    Verdict,
    VerificationFigures,
)

RECIPE = """\
# SmolLM2-135M: three layers and a quarter of every MLP
model: {id: HuggingFaceTB/SmolLM2-135M}
calibration: {dataset: calibration.jsonl, samples: 128, sequence_length: 1024}
depth: {remove: 3}
width: {mlp: 0.75}
refit: {ridge: 0.01}
evaluation:
  tasks: [arc_easy, blimp_anaphor, squad_completion]
  gate: {min_retention: 0.9}
"""
REMOVED = (12, 20, 21)


def sample_layers(count: int = 30, removed: tuple[int, ...] = REMOVED) -> tuple[LayerFigures, ...]:
    """High importance at both ends and a valley between them; errors that grow along depth."""
    layers = []
    for layer in range(count):
        depth = layer / max(count - 1, 1)
        importance = 0.026 + 0.42 * math.exp(-28 * depth) + 0.16 * math.exp(-30 * (1 - depth)) + layer % 5 * 0.004
        gone = layer in removed
        layers.append(
            LayerFigures(
                layer=layer,
                importance=0.017 + 0.0004 * layer if gone else importance,
                removed=gone,
                width=1536,
                kept=None if gone else 1152,
                score_share=None if gone else 0.91 + 0.06 * depth,
                error_cut=None if gone else 0.11 + 0.42 * depth + layer % 3 * 0.012,
                error_refit=None if gone else 0.07 + 0.24 * depth + layer % 3 * 0.006,
            )
        )
    return tuple(layers)


def sample_report(**changes: Any) -> Report:
    """SmolLM2-135M with 3 of 30 layers removed and its MLPs narrowed from 1536 to 1152 neurons."""
    values: dict[str, Any] = {
        "created": "2026-03-14 09:26 UTC",
        "recipe": {"model": {"id": "HuggingFaceTB/SmolLM2-135M"}, "depth": {"remove": 3}},
        "recipe_text": RECIPE,
        "overrides": ("refit.ridge=0.02", "evaluation.limit=500"),
        "provenance": Provenance(
            model="HuggingFaceTB/SmolLM2-135M",
            revision="main",
            commit="93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
            calibration_fingerprint="5be1c7a09d2f4e83b6c0",
            calibration_tokens=131072,
            seed=0,
            trust_remote_code=False,
            device="cpu, 2 threads",
            processes=1,
            versions={"llmprune": "0.1.0", "torch": "2.11.0", "transformers": "5.17.0"},
        ),
        "dense": Size(
            parameters=134515008,
            bytes=269030016,
            layers=30,
            widths={"intermediate_size": 1536},
            experts=None,
            kv_bytes_per_token=23040,
        ),
        "pruned": Size(
            parameters=105978816,
            bytes=211957632,
            layers=27,
            widths={"intermediate_size": 1152},
            experts=None,
            kv_bytes_per_token=20736,
        ),
        "layers": sample_layers(),
        "perplexity": PerplexityFigures(
            dense=15.21, cut=47.36, pruned=21.94, tokens=65536, source="wikitext2_test.txt"
        ),
        "tasks": (
            task("arc_easy", "acc_norm", 0.586, 0.544, lost=41, gained=20),
            task("blimp_anaphor_gender_agreement", "acc", 0.874, 0.852, lost=19, gained=8),
            task("squad_completion", "contains", 0.412, 0.388, lost=None, gained=None),
        ),
        "mean_retention": 0.9483,
        "retention": RetentionFigures(
            retention=0.9483,
            interval=Interval(low=0.9214, high=0.9741, confidence=0.95),
            counted=("arc_easy", "blimp_anaphor_gender_agreement"),
            left_out=("squad_completion",),
            samples=1000,
        ),
        "divergence": DivergenceFigures(
            mean=0.184,
            quantiles={"0.5": 0.061, "0.9": 0.472, "0.99": 1.66, "1.0": 9.21},
            same_first=0.861,
            tokens=65472,
        ),
        "generation": GenerationFigures(
            dense=FreeText(repetition=0.212, loops=0.125, empty=0.0, tokens=61.2),
            pruned=FreeText(repetition=0.274, loops=0.1875, empty=0.0625, tokens=58.8),
            text=FreeText(repetition=0.008, loops=0.0, empty=0.0, tokens=64),
            samples=16,
            prompt_tokens=32,
            new_tokens=64,
            examples=(
                Example(
                    prompt="The game takes place during the Second Europan War. Gallian Army Squad 422, also known as",
                    dense=" the Nameless, is a penal military unit composed of criminals and deserters.",
                    pruned=" the Nameless, is a unit of the army, and the unit of the army is a unit of the army.",
                ),
            ),
        ),
        "speed": SpeedFigures(
            dense=18.4,
            pruned=22.9,
            ratio=1.243,
            ratio_low=1.21,
            ratio_high=1.27,
            batch_size=1,
            prompt_tokens=64,
            new_tokens=32,
            repeats=5,
            device="cpu, 2 threads",
        ),
        "gate": gate(0.9),
        "verification": VerificationFigures(
            parameters=105978816, largest_logit_difference=0.0, cached_generation_equal=True, positions=512
        ),
        "steps": (
            Step(name="plan", seconds=0.83, reused=False),
            Step(name="score", seconds=74.2, reused=True),
            Step(name="prune", seconds=192.6, reused=False),
            Step(name="verify", seconds=14.1, reused=False),
            Step(name="evaluate", seconds=605.0, reused=False),
        ),
        "warnings": (
            "width.mlp: 0.75 of 1536 neurons is 1152, kept as it is: a multiple of 128.",
            "evaluation.limit: 500 of 2376 samples were used; scores are less certain than the whole task's.",
        ),
        "files": {"model": "smollm2-pruned/model", "page": "smollm2-pruned/report.html"},
    }
    return Report(**values | changes)


def gate(least: float, verdict: Verdict = "pass", needed: int | None = None) -> GateFigures:
    """A gate with one bar, for the mean."""
    bar = BarFigures(
        name="mean",
        min_retention=least,
        retention=0.9483,
        interval=Interval(low=0.9214, high=0.9741, confidence=0.95),
        verdict=verdict,
        samples=1000,
        samples_needed=needed,
        reason="its metric is no mean over samples" if verdict == "no interval" else None,
    )
    passed = verdict == "pass"
    return GateFigures(
        min_retention=least, retention=0.9483, passed=passed, confidence=0.95, verdict=verdict, bars=(bar,)
    )


def task(name: str, metric: str, dense: float, pruned: float, lost: int | None, gained: int | None) -> TaskFigures:
    """One task on 500 samples."""
    return TaskFigures(
        task=name,
        metric=metric,
        dense=dense,
        pruned=pruned,
        retention=pruned / dense,
        interval=None
        if lost is None
        else Interval(low=pruned / dense - 0.03, high=pruned / dense + 0.028, confidence=0.95),
        samples=500,
        documents=2376,
        lost=lost,
        gained=gained,
        p_value=None if lost is None else 0.0123,
    )


def bare_report() -> Report:
    """A report in which everything that may be missing is."""
    bare = sample_report()
    unknown = {"widths": {}, "kv_bytes_per_token": None}
    nothing = {"revision": None, "commit": None, "calibration_fingerprint": None, "calibration_tokens": None}
    return sample_report(
        overrides=(),
        provenance=bare.provenance.model_copy(update={**nothing, "versions": {}}),
        dense=bare.dense.model_copy(update=unknown),
        pruned=bare.pruned.model_copy(update=unknown),
        layers=(),
        perplexity=None,
        tasks=(),
        mean_retention=None,
        retention=None,
        divergence=None,
        generation=None,
        speed=None,
        gate=None,
        steps=(),
        warnings=(),
        files={},
    )


class Outline(HTMLParser):
    """Headings, ids and the balance of the tags of a page."""

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
        """A tag that closes itself opens nothing."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember the tag, its id and what names it."""
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        self.named_by += (values.get("aria-labelledby") or "").split()

    def handle_endtag(self, tag: str) -> None:
        """The tag that was opened last must be the one that closes."""
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        """Keep the text of section headings."""
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def summary(report: Report) -> str:
    """What a pipe of 80 columns gets."""
    console = Console(file=io.StringIO(), width=80)
    print_summary(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("report", [sample_report(), bare_report()], ids=["full", "bare"])
def test_a_report_read_back_from_its_json_is_the_same_report(report: Report) -> None:
    """``report.json`` loses nothing."""
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_the_page_of_a_full_report_has_every_section() -> None:
    """Everything a report holds has its place on the page, warnings first."""
    outline = Outline(render_page(sample_report()))
    assert outline.headings == [
        "Warnings",
        "Size",
        "Layers",
        "Tasks",
        "Free generation",
        "Perplexity",
        "Generation speed",
        "Verification",
        "Steps",
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
        "equal in every bit",
        "3 min 13 s",
        "14 min 47 s",
        "refit.ridge=0.02",
        "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        "smollm2-pruned/report.html",
    ],
)
def test_the_page_says_the_figures(figure: str) -> None:
    """Sizes, ratios, removed layers, verdict, times and origins are there in words."""
    assert figure in render_page(sample_report())


def test_the_page_asks_nothing_of_the_network() -> None:
    """No address, no script, no file beside it: the page can be mailed."""
    page = render_page(sample_report())
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "<link" not in page
    assert "@import" not in page
    assert not re.search(r"""src=["']?(?!data:)""", page)
    assert not re.search(r"url\((?!#)", page)


def test_text_of_the_user_stays_text() -> None:
    """A recipe, a task or a path cannot become markup."""
    attack = '</pre><script>alert(1)</script>"><img src=x onerror=alert(1)>'
    base = sample_report()
    report = sample_report(
        recipe_text=attack,
        overrides=(attack,),
        warnings=(attack,),
        files={attack: attack},
        provenance=base.provenance.model_copy(update={"model": attack, "device": attack}),
        perplexity=base.perplexity.model_copy(update={"source": attack}) if base.perplexity else None,
        tasks=(task(attack, attack, 0.5, 0.4, lost=1, gained=1),),
        generation=base.generation.model_copy(
            update={"examples": (Example(prompt=attack, dense=attack, pruned=attack),)}
        )
        if base.generation
        else None,
    )
    page = render_page(report)
    Outline(page)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page


def test_a_page_leaves_out_what_the_report_does_not_hold() -> None:
    """Only size, verification, recipe and provenance are always there."""
    page = render_page(bare_report())
    assert Outline(page).headings == ["Size", "Verification", "Recipe", "Provenance"]
    assert "None" not in page


@pytest.mark.parametrize("field", ["importance", "error_cut", "error_refit", "score_share", "width", "kept"])
def test_a_layer_figure_that_nothing_measured_has_no_trace(field: str) -> None:
    """A chart or a column without data is left out, and the rest stays."""
    layers = tuple(layer.model_copy(update={field: None}) for layer in sample_layers())
    page = render_page(sample_report(layers=layers))
    Outline(page)
    assert ('id="importance-title"' in page) == (field != "importance")
    assert 'id="error-title"' in page
    assert "None" not in page


def test_a_cut_without_refit_shows_one_perplexity_bar_less() -> None:
    """Where nothing was refit, the pruned model is the cut."""
    perplexity = PerplexityFigures(dense=15.2, cut=None, pruned=47.4, tokens=4096, source="held-out.txt")
    page = render_page(sample_report(perplexity=perplexity))
    assert "cut and refit" not in page
    assert "dense: 15.2; pruned: 47.4" in page


@pytest.mark.parametrize("count", [1, 2, 30, 126])
def test_the_page_draws_any_number_of_layers(count: int) -> None:
    """One bar a layer, removed layers hatched, every id once and every name found."""
    removed = tuple(layer for layer in range(count) if layer % 3 == 1)
    page = render_page(sample_report(layers=sample_layers(count, removed)))
    outline = Outline(page)
    assert len(re.findall(r'<rect class="(?:kept|cut)"[^>]*><title>Layer', page)) == count
    assert page.count('<rect class="ground"') == 2 * len(removed)
    assert len(set(outline.ids)) == len(outline.ids)
    assert set(outline.named_by) <= set(outline.ids)


@pytest.mark.parametrize("value", [0.0, -0.3, 1e-9, 4e7, math.inf, math.nan])
def test_extreme_figures_are_drawn_and_do_not_stop_the_page(value: float) -> None:
    """Zero, negative, tiny, huge and not finite: a broken model is when the report is needed most."""
    layers = tuple(
        layer.model_copy(update={"importance": value, "error_cut": value, "error_refit": value})
        if layer.layer % 2
        else layer
        for layer in sample_layers()
    )
    perplexity = PerplexityFigures(dense=15.2, cut=value, pruned=value, tokens=4096, source="held-out.txt")
    page = render_page(sample_report(layers=layers, perplexity=perplexity))
    Outline(page)
    for place in re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width|height|points)="([^"]*)"', page):
        assert "nan" not in place
        assert "inf" not in place


def test_the_summary_says_dense_cut_and_pruned_in_80_columns() -> None:
    """One line a figure, each with its share of dense."""
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
        "Gate passed mean retention 94.8% (92.1–97.4%), at least 90.0% asked for",
        "page smollm2-pruned/report.html",
    } <= rows
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


def test_the_summary_of_a_bare_report_is_only_sizes() -> None:
    """No empty row, no column for a cut that was not measured."""
    lines = [" ".join(line.split()) for line in summary(bare_report()).splitlines()]
    assert "dense pruned of dense" in lines
    assert [line.split()[0] for line in lines if "%" in line] == ["parameters", "weights", "layers"]


def test_the_summary_names_a_gate_that_was_not_met_and_keeps_paths_whole() -> None:
    """A failed gate is said in words, square brackets stay, and a long path stays on one line."""
    path = "/".join(["a-rather-long-folder-name"] * 5)
    report = sample_report(
        gate=gate(0.98, "fail"),
        warnings=("depth.layers: [bold]3[/bold] was given",),
        files={"model": path},
    )
    text = summary(report)
    assert "Gate not passed  mean retention 94.8% (92.1–97.4%), at least 98.0% asked for" in text
    assert "[bold]3[/bold]" in text
    assert path in text


def test_the_mean_of_one_task_is_not_drawn_twice() -> None:
    """One task alone is drawn once, with the gate's mark; several have the mean above them."""
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
        ("not enough samples", "about 2,400 would tell"),
        ("no interval", "no mean over samples"),
    ],
)
def test_the_page_says_every_verdict(verdict: Verdict, said: str) -> None:
    """Failed and undecided gates are said in words, and how many samples would tell."""
    assert said in render_page(sample_report(gate=gate(0.96, verdict, needed=2400)))
