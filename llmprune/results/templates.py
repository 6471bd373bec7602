"""Jinja environments that format figures alike, for report pages, model cards and the service's pages."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from llmprune.common.time_left import rough_duration
from llmprune.results.formatting import (
    as_sentence,
    byte_size,
    change,
    count,
    duration,
    fixed,
    metric_name,
    number,
    percent,
    plural,
    probability,
    ranges,
    share,
    short_model_name,
    span,
    speedup,
    times,
)
from llmprune.results.sentences.calibration import describe_text
from llmprune.results.sentences.evaluation import describe_bar, describe_greedy_agreement, describe_speedup
from llmprune.results.sentences.layers import describe_sparsity, describe_training
from llmprune.results.sentences.lineage import describe_lineage
from llmprune.results.sentences.next_tools import describe_next_tools
from llmprune.results.sentences.recovery import (
    describe_divergence,
    describe_gain,
    describe_recovery,
    describe_recovery_problems,
    describe_rounds,
)
from llmprune.results.sentences.result_files import describe_carried, describe_left, describe_requantized


def template_environment(package: str, folder: str = "", *, escape: bool = True) -> Environment:
    """Return an environment for the templates in a folder of a package, with a filter for every kind of figure.

    An undefined variable raises jinja2's UndefinedError. ``escape``: escape HTML; without it the output is plain text
    such as Markdown, and keeps its last line end.
    """
    environment = Environment(
        loader=PackageLoader(package, folder),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not escape,
    )
    environment.filters.update(
        bar=describe_bar, carried=describe_carried, count=count, duration=duration, fixed=fixed,
        greedy_agreement=describe_greedy_agreement, left=describe_left, lineage=describe_lineage,
        metric=metric_name, next_tools=describe_next_tools, number=number,
        percent=percent, plural=plural, probability=probability, ranges=ranges, recovery=describe_recovery,
        recovery_divergence=describe_divergence, recovery_gain=describe_gain,
        recovery_problems=describe_recovery_problems, requantized=describe_requantized, rounds=describe_rounds,
        rough_duration=rough_duration,
        sentence=as_sentence, short_model_name=short_model_name, size=byte_size, span=span, sparsity=describe_sparsity,
        speedup=speedup, text=describe_text, times=times, training=describe_training, varies=describe_speedup,
    )  # fmt: skip
    environment.globals.update(change=change, share=share)
    return environment
