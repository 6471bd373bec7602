"""Tables of results, from the files that the benchmarks recorded in ``eval/benchmarks/results``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "eval" / "benchmarks" / "results"
TARGETS = {
    "depth-3": "3 of 30 layers",
    "depth-6": "6 of 30 layers",
    "mlp-25": "a quarter of each MLP",
    "mlp-50": "half of each MLP",
    "depth-3 and mlp-25": "3 layers and a quarter of each MLP",
    "heads-33": "a third of the attention heads",
    "2:4": "2:4 in every matrix of the layers",
}
MODEL_TARGETS = {
    "mlp-25": "a quarter of each MLP",
    "mlp-50": "half of each MLP",
    "depth-1": "1 layer",
    "depth-1 and mlp-25": "1 layer and a quarter of each MLP",
    "depth-2": "2 layers",
    "depth-2 and mlp-25": "2 layers and a quarter of each MLP",
}
ONE_KIND = "the peers', 32 x 512"
NO_WINDOWS = "calibration.self_generated=0"  # of most rows; the pages say so once
RECORDED_CRITERION = "depth.criterion.kind=block_influence"  # of layers, where a page says so once
Row = dict[str, Any]


def figures(name: str) -> Any:
    """The figures of a recorded result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["figures"]


def quickstart() -> str:
    """Output of the quickstart, as the README shows it."""
    readme = RESULTS.parents[2] / "README.md"
    return readme.read_text(encoding="utf-8").partition("<!-- quickstart -->\n")[2].partition("<!-- /quickstart -->")[0]


def machine() -> str:
    """Sentence with the machine and versions of the recorded results."""
    told = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))["machine"]
    versions = told["versions"]
    return (
        f"Measured on {told['cores']} cores of an {told['cpu']} with torch {versions['torch']} and transformers "
        f"{versions['transformers']}."
    )


def quality() -> str:
    """Default settings against the peers: perplexity on WikiText, GSM8K and Python's manual."""
    peers = {row["target"]: row for row in figures("peers")["rows"] if row["judged"] is None}
    rows = []
    for target, name in TARGETS.items():
        own, up, cut = (_find(target, settings) for settings in ([], ["refit.up=true"], ["refit=false"]))
        peer = peers.get(target)
        rows.append([name, _texts(own), _texts(up), _texts(cut), f"{_texts(peer)} ({peer['tool']})" if peer else ""])
    dense = peers["dense"]
    head = ["removed", "llmprune", "with `refit: {up: true}`", "cut without refit", "peer"]
    return as_table(head, [["nothing (dense model)", _texts(dense), "", "", ""], *rows])


def calibrations() -> str:
    """Cuts calibrated on more kinds of text."""
    rows = []
    for row in figures("quality")["rows"]:
        if row["calibration"] != ONE_KIND and row["judged"] is None:
            told = [f"`{setting}`" for setting in row["settings"] if setting != NO_WINDOWS]
            settings = ", ".join(told) or "defaults"
            rows.append([TARGETS[row["target"]], row["calibration"].replace(" x ", " × "), settings, _texts(row)])
    order = {name: index for index, name in enumerate(TARGETS.values())}
    rows.sort(key=lambda row: (row[1], order[row[0]], row[2]))
    return as_table(["removed", "calibration", "settings", "WikiText / GSM8K / manual"], rows)


def recovery() -> str:
    """Excess before and after a training, by text."""
    rows = []
    for row in figures("recovery")["rows"]:
        settings = "".join(f", `{setting}`" for setting in row["settings"])
        told = f"{TARGETS[row['target']]}; {row['training']['tokens']:,} tokens{settings}"
        excess = row["excess"]
        rows.append(
            [told, *(f"{excess['repaired'][text]:.3f} → {value:.3f}" for text, value in excess["trained"].items())]
        )
    texts = list(figures("recovery")["rows"][0]["excess"]["trained"])
    return as_table(["removed; trained on", *texts], rows)


def gemma() -> str:
    """Excess of cuts of Gemma 3, by text, with and without refit."""
    found = figures("quality-gemma-3-270m")
    rows = [["dense model, perplexity", "", *(f"{value:.1f}" for value in found["dense"].values())]]
    for row in found["rows"]:
        told = ", ".join(f"`{setting}`" for setting in row["settings"])
        rows.append([MODEL_TARGETS[row["target"]], told, *(f"{value:.3f}" for value in row["excess"].values())])
    return as_table(["removed", "settings", *found["dense"]], rows)


def shapes() -> str:
    """KL divergence of shapes of one size, by text; the chosen ones are bold."""
    found = figures("search")["rows"]
    texts = list(found[0]["divergence"])
    rows = []
    for row in found:
        name = f"**{row['shape']}**" if row["chosen"] else row["shape"]
        values = [f"{row['divergence'][text]:.3f}" for text in texts]
        rows.append([f"{row['size']:.0%}", name, f"{row['scores'][-1]:.3f}", *values, f"{row['unseen']:.3f}"])
    return as_table(["size", "shape", "score", *texts, "mean of the unseen"], rows)


def vocabularies() -> str:
    """Divergence, bits per byte and lost tokens by text, with all tokens and with fewer."""
    rows = []
    for row in figures("vocabulary")["rows"]:
        state = "repaired" if row["repaired"] else "as cut"
        sizes = [f"{row['tokens']:,}", f"{row['neurons']:,}", f"{row['parameters'] / 1e6:.1f} M", state]
        rows.append([*sizes, *(_of_text(found) for found in row["texts"].values())])
    texts = list(figures("vocabulary")["rows"][0]["texts"])
    return as_table(["tokens", "neurons", "parameters", "", *texts], rows)


def _of_text(found: dict[str, float]) -> str:
    """Return ``1.07, 1.479 (1.155), 3.1 %``."""
    bits = f"{found['bits_per_byte']:.3f} ({found['bits_per_byte_dense']:.3f})"
    return f"{found['divergence']:.2f}, {bits}, {100 * found['lost']:.1f} %"


def criteria() -> str:
    """Each criterion on one target, with and without refit."""
    rows = []
    for target, section, default in (("depth-6", "depth", "block_influence"), ("mlp-25", "width", "share")):
        for kind in _kinds(target, section=section, default=default):
            chosen = [] if kind == default else [f"{section}.criterion.kind={kind}"]
            rows.append([TARGETS[target], f"`{kind}`", *(_texts(_find(target, chosen + more)) for more in ([], _CUT))])
    return as_table(["removed", "criterion", "with refit", "without"], rows)


_CUT = ["refit=false"]


def _kinds(target: str, *, section: str, default: str) -> list[str]:
    """Criteria recorded for a target, the default first."""
    start = f"{section}.criterion.kind="
    said = [setting for row in figures("quality")["rows"] if row["target"] == target for setting in row["settings"]]
    return list(dict.fromkeys([default, *(one.removeprefix(start) for one in said if one.startswith(start))]))


def half_width() -> str:
    """Half the neurons by every criterion, on three kinds of prose."""
    recorded = figures("width")
    rows = [
        [f"`{row['criterion']}`", "yes" if row["refit"] else "no", *(f"{row[text]:,.1f}" for text in recorded["dense"])]
        for row in recorded["rows"]
    ]
    dense = ["dense model", "", *(f"{value:,.1f}" for value in recorded["dense"].values())]
    return as_table(["criterion", "refit", *recorded["dense"]], [dense, *rows])


def forward_passes() -> str:
    """Cost of pruning in forward passes of the decoder over the same tokens."""
    speed, sparse = figures("passes-speed"), figures("passes-sparsity")
    rows = [[f"depth and width: {name}", *_spread(speed, name)] for name in speed["ratios"]]
    rows += [[f"2:4 sparsity: {name}", *_spread(sparse, name)] for name in sparse["ratios"]]
    return as_table(["step", "forward passes, median", "least – most"], rows)


def _spread(recorded: Row, name: str) -> list[str]:
    ratios = recorded["ratios"][name]
    return [f"{recorded['medians'][name]:.1f}", f"{min(ratios):.1f} – {max(ratios):.1f}"]


def memory() -> str:
    """Peak memory of pruning from disk against the size of the model."""
    rows = []
    recorded = (
        ("passes-memory", "depth and width"),
        ("passes-memory-mixture", "depth and width of a mixture"),
        ("passes-memory-sparse", "2:4 sparsity"),
    )
    for name, what in recorded:
        for run in figures(name)["runs"]:
            sizes = (run[key] / 1e9 for key in ("model_bytes", "layer_bytes", "peak_anonymous"))
            rows.append([what, str(run["layers"]), *(f"{size:.2f} GB" for size in sizes)])
    return as_table(["removed", "layers", "model", "one layer", "peak memory"], rows)


def processes_memory() -> str:
    """Private memory of each of two processes, above that of an interpreter with the libraries."""
    rows = [
        [
            {"auto": "bfloat16, as in the files", "float32": "float32, converted"}[run["dtype"]],
            *(f"{size / 1e9:.2f} GB" for size in (run["planned"]["weights"], run["layer_bytes"])),
            " and ".join(f"{size / 1e9:.2f}" for size in run["above_bare"]) + " GB",
        ]
        for run in figures("passes-private-memory")["runs"]
    ]
    return as_table(["computed in", "model", "one layer", "private memory of each process"], rows)


def start_up() -> str:
    """Seconds from the command to the first layer, and what they are for."""
    recorded = figures("passes-startup")
    names = {
        "imports": "libraries",
        "plan": "plan",
        "texts": "calibration text",
        "model": "opening the model",
    }
    rows = [
        [names[part], f"{recorded['medians'][part]:.1f} s", *_least_most(recorded["parts"][part])] for part in names
    ]
    whole = ["all", f"{recorded['median']:.1f} s", *_least_most(recorded["seconds"])]
    return as_table(["part", "median", "least – most"], [*rows, whole])


def _least_most(seconds: Sequence[float]) -> list[str]:
    return [f"{min(seconds):.1f} – {max(seconds):.1f} s"]


def model_support() -> str:
    """Every causal model type of transformers, as the sweep recorded it."""
    text = (RESULTS / "sweep.md").read_text(encoding="utf-8")
    return text.partition("\n")[2].strip()


def _find(target: str, settings: Sequence[str]) -> Row | None:
    """The recorded row of a target on the peers' tokens, without generated windows.

    Neither that nor what a depth criterion judges counts as a setting, nor the criterion that was the default once.
    """
    for row in figures("quality")["rows"]:
        judged = (f"depth.criterion.{name}=" for name in ("windows", "tokens", "candidates", "spans"))
        left_out = (NO_WINDOWS, RECORDED_CRITERION, *judged)
        told = [setting for setting in row["settings"] if not setting.startswith(left_out)]
        if NO_WINDOWS not in row["settings"]:
            continue
        key = row["target"], row["calibration"], row["judged"], told
        if key == (target, ONE_KIND, None, list(settings)):
            found: Row = row
            return found
    return None


def _texts(row: Row | None) -> str:
    """Perplexities on WikiText, GSM8K and the manual; only the first where the others were not measured."""
    if row is None:
        return ""
    others = row["perplexity"] if "tool" in row else {"wikitext": row["perplexity"], **row["unseen"]}
    return " / ".join(_short(value) for value in map(others.get, ("wikitext", "gsm8k", "pydoc")) if value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def as_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
