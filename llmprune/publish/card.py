"""The model card: metadata that the hub understands, and what a reader wants to know before using the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from llmprune.publish.public_names import public_name, public_sources
from llmprune.results.evaluation_figures import TaskFigures
from llmprune.results.formatting import (
    NOTHING,
    count,
    describe_carried,
    describe_left,
    describe_sparsity,
    describe_speedup,
    fixed,
    if_changed,
    interval_name,
    metric_name,
    number,
    percent,
    plural,
    ranges,
    share,
    span,
    speedup,
    weight,
    width_names,
)
from llmprune.results.schema import Report, Size

TAGS = ("pruned", "llmprune")
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LIBRARY = "transformers"


@dataclass(frozen=True)
class Base:
    """What a card says of the model that was pruned."""

    name: str
    commit: str | None  # None where it is no hub model
    card: dict[str, Any]  # metadata of its own card; empty where it has none


@dataclass(frozen=True)
class Loading:
    """How the result is loaded."""

    auto_class: str
    tokenizer: bool
    remote_code: bool


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of the card in a model's folder; empty where there is none that can be read."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # a card is anybody's YAML: without it the licence is not inherited, and the card says so
        return {}


def write_card(
    repo_id: str, report: Report, *, base: Base, loading: Loading, refused: str | None, plots: Sequence[str]
) -> str:
    """README.md: metadata and body. ``plots``: names of the charts that travel along, as ``plots/NAME.png``."""
    from huggingface_hub import ModelCard

    body = _template().render(
        repo_id=repo_id,
        report=report,
        base_name=public_name(base.name, local=base.commit is None),
        base=base,
        loading=loading,
        refused=refused,
        plots=plots,
        sizes=_size_rows(report.dense, report.pruned),
        speed=report.speed,
        perplexity=report.perplexity,
        source=public_sources(report.perplexity.source) if report.perplexity else "",
        tasks=[_task_row(task) for task in report.tasks],
        removed=ranges(report.removed_layers),
        widths=_width_sentence(report.dense, report.pruned),
        licence=base.card.get("license"),
        smaller=report.pruned.parameters < report.dense.parameters,
        fence=_fence(report.recipe_text),
        mean_interval=span(report.retention.interval if report.retention else None),
        interval_name=interval_name([task.interval for task in report.tasks]),
        inverted=any(not task.higher_is_better for task in report.tasks),
    )
    card = ModelCard(f"---\n{_metadata(repo_id, report, base=base, loading=loading)}\n---\n\n{body}")
    return str(card.content)


def _metadata(repo_id: str, report: Report, *, base: Base, loading: Loading) -> str:
    from huggingface_hub import ModelCardData

    inherited = {key: base.card[key] for key in _INHERITED if base.card.get(key)}
    inherited.setdefault("pipeline_tag", "text-generation")
    is_hub = base.commit is not None
    data = ModelCardData(
        base_model=base.name if is_hub else None,
        base_model_relation="finetune" if is_hub else None,
        library_name=_LIBRARY,
        tags=list(TAGS),
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(report) or None,
        **inherited,
    )
    return str(data.to_yaml())


def _eval_results(report: Report) -> list[Any]:
    """Dense and pruned beside each other, so that neither is read without the other."""
    from huggingface_hub import EvalResult

    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.task,
            dataset_name=task.task,
            metric_type=task.metric,
            metric_name=f"{task.metric}, {which}",
            metric_value=value,
        )
        for task in report.tasks
        for which, value in (("pruned", task.pruned), ("dense base model", task.dense))
    ]
    if figures := report.perplexity:
        found += [
            EvalResult(
                task_type="text-generation",
                dataset_type=public_sources(figures.source),
                dataset_name=f"{public_sources(figures.source)}, {plural(figures.tokens, 'token')}",
                metric_type="perplexity",
                metric_name=f"perplexity, {which}",
                metric_value=value,
            )
            for which, value in (("pruned", figures.pruned), ("dense base model", figures.dense))
        ]
    return found


def _size_rows(dense: Size, pruned: Size) -> list[tuple[str, str, str, str]]:
    rows = [
        ("parameters", dense.parameters, pruned.parameters, count),
        ("weights", dense.bytes, pruned.bytes, weight),
        ("layers", dense.layers, pruned.layers, number),
        *((name, dense.widths[field], pruned.widths.get(field), number) for field, name in _names(dense).items()),
        ("experts", dense.experts, pruned.experts, number),
        ("key-value heads", *if_changed(dense.kv_groups, pruned.kv_groups), number),
        ("KV cache per token", dense.kv_bytes_per_token, pruned.kv_bytes_per_token, weight),
    ]
    return [
        (name, write(before), write(after), percent(share(before, after)))
        for name, before, after, write in rows
        if before is not None and after is not None
    ]


def _names(size: Size) -> dict[str, str]:
    return width_names(size.widths)


def _width_sentence(dense: Size, pruned: Size) -> str:
    """``MLP width 1,536 → 1,152``, for each width, experts and heads where they differ; empty where none does."""
    changes = [
        f"{name} {number(dense.widths[field])} → {number(pruned.widths.get(field))}"
        for field, name in _names(dense).items()
        if pruned.widths.get(field) != dense.widths[field]
    ]
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


def _cell(text: object) -> str:
    """Text that stays in its cell of a Markdown table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", r"\|")


def _code(text: str) -> str:
    """Text that a Markdown page shows as it is."""
    return f"`{_cell(text).replace('`', chr(39))}`"


def _fence(text: str) -> str:
    """A code fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("llmprune.publish", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.globals["share"] = share
    environment.filters |= {"number": number, "percent": percent, "count": count}
    environment.filters |= {"cell": _cell, "sparsity": describe_sparsity, "plural": plural}
    environment.filters |= {"speedup": speedup, "varies": describe_speedup}
    environment.filters |= {"carried": lambda files: _code(describe_carried(files))}
    environment.filters |= {"left": lambda files: _code(describe_left(files))}
    return environment.get_template("card.md.j2")
