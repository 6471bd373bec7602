"""Model card: hub metadata, and a body with everything a reader needs before using the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template

from llmprune.publish.generated_windows import published_windows
from llmprune.publish.llama_cpp import ARCHITECTURES
from llmprune.publish.public_names import public_name, public_recovery, public_search, public_sources
from llmprune.results.figures.evaluation import TaskFigures
from llmprune.results.figures.lineage import Ancestor
from llmprune.results.figures.model_size import Size
from llmprune.results.figures.recovery import RecoveryScore
from llmprune.results.figures.search import SearchFigures
from llmprune.results.formatting import (
    NOTHING,
    as_sentence,
    fixed,
    interval_name,
    metric_name,
    number,
    percent,
    plural,
    ranges,
    short_model_name,
    span,
)
from llmprune.results.report_schema import Report
from llmprune.results.sentences.lineage import describe_lineage
from llmprune.results.sentences.recovery import describe_gain
from llmprune.results.sentences.result_files import describe_carried, describe_left
from llmprune.results.sentences.search import describe_broken, describe_budgets, describe_search
from llmprune.results.sentences.vocabulary import vocabulary_lines
from llmprune.results.tables.rounds import round_table
from llmprune.results.tables.sizes import size_rows, width_names
from llmprune.results.templates import template_environment

TAGS = ("pruned", "llmprune")
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
LIBRARY = "transformers"


@dataclass(frozen=True)
class Base:
    """Base model of the card."""

    name: str
    commit: str | None  # None if it is not from the hub
    card: dict[str, Any]  # metadata of its own card; empty without one


@dataclass(frozen=True)
class Loading:
    """Requirements for loading the pruned model. ``architecture``: as its config names it."""

    auto_class: str
    tokenizer: bool
    remote_code: bool
    architecture: str | None = None

    @property
    def in_llama_cpp(self) -> bool:
        """Check that the converter of llama.cpp knows the architecture, which runs no code of the model."""
        return self.architecture in ARCHITECTURES and self.tokenizer and not self.remote_code


@dataclass(frozen=True)
class CardFacts:
    """Facts of a card besides the report. ``refused``: reason of the gate against publishing; None if there is none."""

    base: Base
    loading: Loading
    refused: str | None


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read the metadata of the card in a model's folder; empty if there is none or it is unreadable."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # the card is arbitrary YAML; without it no licence is inherited, and the new card says so
        return {}


def write_card(
    repo_id: str, report: Report, *, facts: CardFacts, plots: Sequence[str], quantized_repo_id: str | None = None
) -> str:
    """Return README.md, metadata and body.

    ``plots``: names of the charts pushed as ``plots/NAME.png``. ``quantized_repo_id``: of the quantized result, if any.
    """
    from huggingface_hub import ModelCard

    base, loading = facts.base, facts.loading
    agreement = report.generation.agreement if report.generation else None
    intervals = [*(task.interval for task in report.tasks), agreement.interval if agreement else None]
    body = card_template("card.md.j2").render(
        repo_id=repo_id,
        report=report,
        base_name=public_name(base.name, local=base.commit is None),
        base=base,
        loading=loading,
        refused=facts.refused,
        quantized_repo_id=quantized_repo_id,
        plots=plots,
        sizes=size_rows(report.dense, report.pruned),
        speed=report.speed,
        perplexity=report.perplexity,
        agreement=agreement,
        source=public_sources(report.perplexity.source) if report.perplexity else "",
        tasks=[_task_row(task) for task in report.tasks],
        removed=ranges(report.removed_layers),
        widths=_width_sentence(report.dense, report.pruned),
        licence=base.card.get("license"),
        quantised="Q8_0" if report.next_tools and report.next_tools.k_quants.broken else "Q4_K_M",
        lineage=describe_lineage(report.lineage, report.pruned.parameters, name=_public_ancestor),
        smaller=report.pruned.parameters < report.dense.parameters,
        fence=_fence(report.recipe_text),
        mean_interval=span(report.retention.interval if report.retention else None),
        interval_name=interval_name(intervals),
        suite=report.recipe.get("evaluation", {}).get("suite"),
        limited=any(task.documents is not None and task.samples < task.documents for task in report.tasks),
        generated=list(published_windows(report)),
        wrote_calibration=any(source.text is None for source in report.provenance.calibration_sources),
        search=_search(public_search(report.search)) if report.search else [],
        recovery=public_recovery(report.recovery) if report.recovery else None,
        rounds=round_table(report) if report.rounds else None,
        scores=[_score_row(score) for score in report.recovery_scores.scores] if report.recovery_scores else [],
        gain=describe_gain(report.recovery_scores) if report.recovery_scores else None,
        vocabulary=[_cell(line) for line in vocabulary_lines(report, public_name)],
        inverted=any(not task.higher_is_better for task in report.tasks),
    )
    card = ModelCard(f"---\n{_metadata(repo_id, report, base=base, loading=loading)}\n---\n\n{body}")
    return str(card.content)


def _metadata(repo_id: str, report: Report, *, base: Base, loading: Loading) -> str:
    from huggingface_hub import ModelCardData

    is_hub = base.commit is not None
    data = ModelCardData(
        base_model=base.name if is_hub else None,
        base_model_relation="finetune" if is_hub else None,
        library_name=LIBRARY,
        tags=list(TAGS),
        model_name=short_model_name(repo_id),
        eval_results=_eval_results(report) or None,
        **inherited_metadata(base),
    )
    return str(data.to_yaml())


def inherited_metadata(base: Base) -> dict[str, Any]:
    """Return what the base model's card says of licence, languages and use, and holds for what is made from it."""
    return {"pipeline_tag": "text-generation"} | {key: base.card[key] for key in _INHERITED if base.card.get(key)}


def _eval_results(report: Report) -> list[Any]:
    """Return the results of both models, so that the hub shows neither without the other."""
    from huggingface_hub import EvalResult

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.task,
            dataset_name=task.task,
            metric_type=task.metric,
            metric_name=f"{task.metric}, {model}",
            metric_value=value,
        )
        for task in report.tasks
        for model, value in (("pruned", task.pruned), ("dense base model", task.dense))
    ]
    if figures := report.perplexity:
        results += [
            EvalResult(
                task_type="text-generation",
                dataset_type=public_sources(figures.source),
                dataset_name=f"{public_sources(figures.source)}, {plural(figures.tokens, 'token')}",
                metric_type="perplexity",
                metric_name=f"perplexity, {model}",
                metric_value=value,
            )
            for model, value in (("pruned", figures.pruned), ("dense base model", figures.dense))
        ]
    return results


def _public_ancestor(one: Ancestor) -> str:
    return public_name(one.name, local=one.commit is None)


def _width_sentence(dense: Size, pruned: Size) -> str:
    """Return ``MLP width 1,536 → 1,152`` for each changed width, hidden size, number of experts or of heads."""
    changes = [
        f"{name} {number(dense.widths[field])} → {number(pruned.widths.get(field))}"
        for field, name in width_names(dense.widths).items()
        if pruned.widths.get(field) != dense.widths[field]
    ]
    if dense.hidden != pruned.hidden:
        changes.append(f"hidden size {number(dense.hidden)} → {number(pruned.hidden)}")
    if dense.experts != pruned.experts:
        changes.append(f"experts in each mixture {number(dense.experts)} → {number(pruned.experts)}")
    if dense.kv_groups != pruned.kv_groups:
        changes.append(f"key-value heads of each layer {number(dense.kv_groups)} → {number(pruned.kv_groups)}")
    return "; ".join(changes)


def _task_row(task: TaskFigures) -> tuple[str, ...]:
    flips = f"{task.lost} / {task.gained}" if task.lost is not None else NOTHING
    name = f"{task.task} ({metric_name(task)})"
    figures = fixed(task.dense), fixed(task.pruned), percent(task.retention), span(task.interval)
    return (_cell(name), *figures, str(task.samples), flips)


def _score_row(score: RecoveryScore) -> tuple[str, ...]:
    flips = f"{score.lost} / {score.gained}" if score.lost is not None else NOTHING
    scores = fixed(score.dense), fixed(score.before), fixed(score.after)
    return (
        _cell(f"{score.task} ({metric_name(score)})"),
        *scores,
        percent(score.gain),
        span(score.gain_interval),
        flips,
    )


def _search(found: SearchFigures) -> list[str]:
    """Return what was searched, the choice for each reported budget and its margin, and what one step more costs."""
    sentences = [describe_search(found)]
    for budget in describe_budgets(found):
        sentences += [f"budget: {budget.limits}", f"chosen: {budget.choice}", *budget.margin]
        sentences += [f"one step further in {sentence}" for sentence in budget.further]
    return [as_sentence(sentence) for sentence in (*sentences, *describe_broken(found), *found.notes)]


def _cell(text: object) -> str:
    """Return text that cannot end its cell of a Markdown table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", r"\|")


def _code(text: str) -> str:
    """Return text as inline code of Markdown."""
    return f"`{_cell(text).replace('`', chr(39))}`"


def _fence(text: str) -> str:
    """Return a code fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


@cache
def card_template(name: str) -> Template:
    """Return the template of a model card."""
    environment = template_environment("llmprune.publish", ".", escape=False)
    environment.filters.update(
        public=public_name,
        public_texts=public_sources,
        cell=_cell,
        code=_code,
        carried=lambda files: _code(describe_carried(files)),
        left=lambda files: _code(describe_left(files)),
    )
    return environment.get_template(name)
