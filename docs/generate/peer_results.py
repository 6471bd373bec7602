"""Tables of peers beside llmprune, by text, from ``peers.json`` and the records of ``quality.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator

from generate.results import RESULTS, TARGETS, Row, as_table, figures

PROTOCOL = "SmolLM2-135M-Instruct"
UNSEEN = ("gsm8k", "pydoc")  # of no calibration's kind; for other models WikiText is not either
MODELS = {"second": "A Gemma-3-shaped model of `second_model.py`, trained for 25 minutes of processor time"}
KINDS = {"wikitext": "WikiText", "c4": "C4", "wikipedia": "Wikipedia", "gsm8k": "GSM8K", "pydoc": "manual"}
NAMES = {**TARGETS, "depth-1": "1 layer", "depth-1 and mlp-25": "1 layer and a quarter of each MLP"}


def peers() -> str:
    """Excess of each method on every text: a table for each model, targets and calibrations apart, the best first."""
    rows = [row for row in figures("peers")["rows"] if row["judged"] is not None]
    return "\n\n".join(_table_of(dense, rows) for dense in rows if dense["target"] == "dense")


def _table_of(dense: Row, rows: list[Row]) -> str:
    kinds = list(dense["perplexity"])
    values = [f"{dense['perplexity'][kind]:.2f}" for kind in kinds]
    lines = [["nothing (dense model, perplexity)", "", "", *values, "", f"{dense['parameters'] / 1e6:.1f} M"]]
    measured = [row for row in rows if _same(row, dense) and row["target"] != "dense"]
    told = [
        (
            row["target"],
            row["calibration"],
            row["tool"] + ("" if row["loads_plain"] else " ¹"),
            _excess(row["perplexity"], dense),
            row["parameters"],
        )
        for row in measured
    ]
    targets = list(dict.fromkeys(row["target"] for row in measured))
    told += [one for one in _own(dense) if one[0] in targets]
    told.sort(key=lambda one: (list(NAMES).index(one[0]), one[1], _mean(one[3], dense)))
    for target, calibration, tool, excess, parameters in told:
        cells = [f"{excess[kind]:.3f}" if kind in excess else "" for kind in kinds]
        mean = f"{_mean(excess, dense):.3f}"
        name = NAMES[target]
        lines.append([name, calibration.replace(" x ", " × "), tool, *cells, mean, f"{parameters / 1e6:.1f} M"])
    head = ["removed", "calibration", "method", *(KINDS[kind] for kind in kinds), "mean of unseen", "parameters"]
    model = MODELS.get(dense["model"], dense["model"])
    return (
        f"{model}, judged on {dense['judged']} windows of each text ({dense['arithmetic']}):\n\n{as_table(head, lines)}"
    )


def _own(dense: Row) -> Iterator[tuple[str, str, str, dict[str, float], int]]:
    """Yield llmprune's rows for the same windows: target, calibration, method, excess and parameters."""
    if dense["model"] == PROTOCOL:
        for row in figures("quality")["rows"]:
            if row["judged"] == dense["judged"]:
                excess = _excess({"wikitext": row["perplexity"], **row["unseen"]}, dense)
                yield row["target"], row["calibration"], _named(row["settings"]), excess, row["parameters"]
    elif (RESULTS / f"quality-{dense['model']}.json").is_file():
        recorded = figures(f"quality-{dense['model']}")
        for row in recorded["rows"]:
            yield row["target"], recorded["calibration"], _named(row["settings"]), row["excess"], row["parameters"]


def _named(settings: list[str]) -> str:
    return "**llmprune**" + "".join(f" `{setting}`" for setting in settings)


def _same(row: Row, dense: Row) -> bool:
    return all(row[name] == dense[name] for name in ("model", "judged"))


def _excess(perplexity: dict[str, float], dense: Row) -> dict[str, float]:
    """Return ln(perplexity / dense perplexity) by text."""
    return {kind: math.log(value / dense["perplexity"][kind]) for kind, value in perplexity.items()}


def _mean(excess: dict[str, float], dense: Row) -> float:
    """Return the mean over the texts that are of no calibration's kind."""
    unseen = UNSEEN if dense["model"] == PROTOCOL else ("wikitext", *UNSEEN)
    return sum(excess[kind] for kind in unseen) / len(unseen)
