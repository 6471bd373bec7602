"""llmprune eval against lm-eval itself: equality of the scores to the last digit, and cost against two direct runs.

    python eval/benchmarks/evaluation.py DATA [--limit 200] [--generative 6]

DATA is a folder with a make_tasks.py that writes task files for the data that lies there (arc_easy_local, blimp_local,
gsm8k_local). The real SmolLM2-135M-Instruct and a pruned version of it are evaluated by the ``lm_eval`` command, one
after the other, and by one ``llmprune eval --against`` with an empty cache. Cost is processor time of the commands,
which other work on the machine hardly changes, beside wall time. Figures go to results/evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SMOLLM2, TOPICS, finish, record, run, write_recipe

from llmprune.checkpoint.location import folder_of
from llmprune.recipe.model import ModelSource


def timed(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds of wall and processor time of one command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{command[:6]} failed: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(time.perf_counter() - start, 1), "cpu": round(cpu, 1)}


def direct(model: str, tasks: str, include: Path, limit: int, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The ``lm_eval`` command on one model: its cost, and its results with their samples."""
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
        *("--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", "8"),
        *("--tasks", tasks, "--include_path", str(include), "--limit", str(limit)),
        *("--output_path", str(folder), "--log_samples"),
    ]
    cost = timed(command, {})
    (results,) = folder.rglob("results_*.json")
    samples = {path.name.split("_2")[0]: path for path in folder.rglob("samples_*.jsonl")}
    found = json.loads(results.read_text())["results"]
    rows = {
        name.removeprefix("samples_"): [json.loads(line) for line in path.read_text().splitlines()]
        for name, path in samples.items()
    }
    return cost, {"results": found, "samples": rows}


def ours(model: str, base: str, tasks: str, include: Path, limit: int, folder: Path) -> tuple[dict[str, float], Any]:
    """``llmprune eval --against`` with an empty cache."""
    command = [
        *(sys.executable, "-m", "llmprune", "eval", model, "--against", base, "--tasks", tasks),
        *("--include-path", str(include), "--limit", str(limit), "--output", str(folder / "ours")),
    ]
    cost = timed(command, {"HF_HOME": str(folder / "home")})
    return cost, json.loads((folder / "ours" / "evaluation.json").read_text())


def equal(theirs: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """Both values of every metric of each task, and if all samples agree."""
    found: dict[str, Any] = {}
    for task in mine["tasks"]:
        name, metric, filter_name = task["task"], task["metric"], task["filter"]
        values = {key: (theirs["results"][name][key], value) for key, value in task["values"].items()}
        rows = {row["doc_id"]: row[metric] for row in theirs["samples"][name] if row["filter"] == filter_name}
        found[name] = {
            "values": values,
            "equal": all(one == other for one, other in values.values()),
            "samples_equal": rows == {sample["doc_id"]: sample["value"] for sample in task["samples"]},
            "samples": len(rows),
        }
    return found


def main() -> None:
    """Prune, evaluate both ways, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=200, help="samples of each multiple-choice task")
    parser.add_argument("--generative", type=int, default=6, help="samples of the generative task")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, arguments.data / "make_tasks.py", folder / "tasks"], check=True)
        calibration = TOPICS | {"samples": 8, "sequence_length": 256}
        recipe = write_recipe(
            folder / "recipe.yaml",
            {"id": SMOLLM2, "dtype": "float32"},
            calibration,
            depth={"remove": 2},
            width={"mlp": 0.75},
        )
        finish(run(recipe, folder / "run"))
        base, model = str(folder_of(ModelSource(id=SMOLLM2), "weights")), str(folder / "run" / "model")
        sets = (("arc_easy_local,blimp_local", arguments.limit), ("gsm8k_local", arguments.generative))
        for tasks, limit in sets:
            place = folder / tasks.split(",")[0]
            dense_cost, dense = direct(base, tasks, folder / "tasks", limit, place / "dense")
            pruned_cost, pruned = direct(model, tasks, folder / "tasks", limit, place / "pruned")
            cost, found = ours(model, base, tasks, folder / "tasks", limit, place)
            figures[tasks] = {
                "limit": limit,
                "seconds": {"lm_eval dense": dense_cost, "lm_eval pruned": pruned_cost, "llmprune eval": cost},
                "cpu_ratio": round(cost["cpu"] / (dense_cost["cpu"] + pruned_cost["cpu"]), 3),
                "wall_ratio": round(cost["wall"] / (dense_cost["wall"] + pruned_cost["wall"]), 3),
                "dense": equal(dense, found["against_results"]),
                "pruned": equal(pruned, found["results"]),
                "retention": found["retention"],
            }
    record("evaluation", figures)


if __name__ == "__main__":
    main()
