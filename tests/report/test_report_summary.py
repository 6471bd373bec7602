"""Summary of a report on a terminal of 80 columns."""

from __future__ import annotations

from helpers.reports import (
    bare_report,
    gate,
    sample_report,
    summary,
)


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
