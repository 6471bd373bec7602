"""lm-eval's plain command gives the scores of the run's report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from llmprune.evaluation.next_tools.base import NotChecked, Subject, ToolCheck, ToolFailure
from llmprune.results.figures.evaluation import TaskFigures
from llmprune.results.load_report import load_report

_MOST_SAMPLES = 2_000  # the task with the fewest samples is run again, if it has no more
_FLIPPED = 2.0  # samples whose answer may differ, because batches of another size round differently


def work(subject: Subject) -> str:
    """Run the report's shortest task with the command of lm-eval, and compare."""
    if subject.report is None:
        raise NotChecked("there is no report.json with scores: give the folder of a run")
    report = load_report(subject.report)
    if not report.tasks:
        raise NotChecked("the run evaluated no task")
    task = min(report.tasks, key=lambda one: one.samples)
    if task.samples > _MOST_SAMPLES:
        raise NotChecked(f"each task of the report has more than {_MOST_SAMPLES:,} samples")
    value = _score(subject, task, evaluation=report.recipe["evaluation"])
    told = f"{task.task} {task.metric} {value:.4f}, and {task.pruned:.4f} in the report"
    if abs(value - task.pruned) > _FLIPPED / task.samples:
        raise ToolFailure(told)
    return told


def _score(subject: Subject, task: TaskFigures, *, evaluation: Mapping[str, Any]) -> float:
    """Return the score of a task by lm-eval's own command."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", task.task]
    command += ["--model_args", f"pretrained={subject.folder},dtype=auto", "--output_path", str(subject.scratch)]
    command += ["--batch_size", str(evaluation["batch_size"]), "--limit", str(task.samples)]
    if evaluation.get("include_path"):
        command += ["--include_path", str(evaluation["include_path"])]
    if evaluation.get("num_fewshot") is not None:
        command += ["--num_fewshot", str(evaluation["num_fewshot"])]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    files = sorted(subject.scratch.rglob("results*.json"))
    if done.returncode or not files:
        raise ToolFailure(f"the command failed: {([*done.stderr.splitlines(), 'no message'])[-2:][0]}")
    scores = json.loads(files[-1].read_text(encoding="utf-8"))["results"][task.task]
    return next(float(value) for name, value in scores.items() if name.partition(",")[0] == task.metric)


CHECK = ToolCheck("lm-eval: the report's scores", work, modules=("lm_eval",), install='pip install "lm-eval[hf]"')
