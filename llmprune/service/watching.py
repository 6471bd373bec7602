"""How far a job is, from the file that its run writes, and what it came to, from its report and its log."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llmprune.hub.published import Published
from llmprune.service.job import Figures

PROGRESS = "progress.json"
PUBLISHED = "published.json"
# The share of a run that is over when a step begins, and the step's own share: rough, the same for every model.
SHARES = {
    "starting": (0.0, 0.04),
    "plain forward pass": (0.04, 0.04),
    "pass 1": (0.08, 0.32),
    "pass 2": (0.4, 0.33),
    "saving": (0.73, 0.03),
    "verification": (0.76, 0.08),
    "evaluation": (0.84, 0.16),
}
_MEANING = {1: "the run failed", 2: "the recipe cannot be run as it is", 3: "the gate was not met"}
_TAIL = 20_000  # bytes of the log that are searched for the error


def read_progress(folder: Path, fraction: float) -> dict[str, Any]:
    """The columns step, done, total, fraction and seconds_left; empty where the run has said nothing.

    ``fraction`` is the last one known: it never goes back, and stays through steps of no known share.
    """
    try:
        told = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        step, done, total, seconds = (told[name] for name in ("step", "done", "total", "seconds"))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    begins, share = SHARES.get(re.split(r"[:(]", step)[0].strip(), (fraction, 0.0))
    known = fraction if begins + share <= fraction else begins + share * (done / total if total else 0.0)
    left = seconds / done * (total - done) if done and total and seconds else None
    return {
        "step": step,
        "done": done,
        "total": total,
        "fraction": round(max(fraction, known), 4),
        "seconds_left": round(left, 1) if left is not None else None,
    }


def read_results(run_folder: Path, code: int | None) -> dict[str, str | None]:
    """What a job came to, as JSON by column; a run whose gate was not met has figures too."""
    if code not in (0, 3):
        return {}
    return {"figures": read_figures(run_folder), "published": read_published(run_folder)}


def read_published(run_folder: Path) -> str | None:
    """Where a push has sent the model; None where the job is no push."""
    try:
        text = (run_folder / PUBLISHED).read_text(encoding="utf-8")
        return Published.model_validate_json(text).model_dump_json()
    except (OSError, ValueError):
        return None


def read_figures(run_folder: Path) -> str | None:
    """The figures of a finished run as JSON; None where it has no report."""
    try:
        report = json.loads((run_folder / "report.json").read_text(encoding="utf-8"))
        dense, pruned, perplexity, speed = (report[name] for name in ("dense", "pruned", "perplexity", "speed"))
        interval = report["retention"]["interval"] if report.get("retention") else None
        figures = Figures(
            parameters=(dense["parameters"], pruned["parameters"]),
            bytes=(dense["bytes"], pruned["bytes"]),
            layers=(dense["layers"], pruned["layers"]),
            perplexity=(perplexity["dense"], perplexity["pruned"]) if perplexity else None,
            speed=(speed["dense"], speed["pruned"]) if speed else None,
            retention=report["mean_retention"],
            interval=(interval["low"], interval["high"]) if interval else None,
            confidence=interval["confidence"] if interval else None,
            gate_passed=report["gate"]["passed"] if report["gate"] else None,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return figures.model_dump_json()


def explain(log: Path, code: int | None) -> str:
    """Why an attempt failed, in words: what llmprune said last, or what its exit code means."""
    if code is None or code < 0 or code in (128 + 9, 247):
        number = f"signal {-code}" if code and code < 0 else "SIGKILL"
        return (
            f"its process was ended from outside ({number}), as the system does where memory runs out; "
            "a retry continues after one of its last finished layers"
        )
    said = re.findall(r"^llmprune: (.+(?:\n  - .+)*)", read_tail(log), re.MULTILINE)
    return str(said[-1]) if said else f"{_MEANING.get(code, 'the run failed')} (exit code {code}); its log says more"


def read_tail(log: Path, size: int = _TAIL) -> str:
    """The last bytes of a log as text."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - size))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
