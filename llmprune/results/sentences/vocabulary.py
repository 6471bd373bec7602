"""Sentences about a cut of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

from llmprune.results.figures.vocabulary import VocabularySource
from llmprune.results.formatting import fixed, percent, plural, times
from llmprune.results.report_schema import Report

_BEFORE_CUT = "perplexity, divergence and greedy answers are those of the model before its vocabulary was cut"


def vocabulary_lines(report: Report, name_of: Callable[[str], str] = str) -> list[str]:
    """Return the tokens kept, the text in them, and the figures of the cut, a sentence each; none without a cut.

    ``name_of``: returns the name of a source for readers.
    """
    found = report.vocabulary
    if found is None:
        return []
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in found.required.items() if number)
    sentences = [
        f"{found.kept:,} of {plural(found.tokens, 'token')} kept, which make up {percent(found.coverage, 2)} of "
        f"held-out text; kept whatever the text: {reasons}"
    ]
    if sources := [describe_source(source, name_of) for source in found.sources if source.lines]:
        sentences.append(f"held-out text in tokens: {'; '.join(sources)}")
    difference = found.largest_logit_difference
    equal = "equal those of the whole vocabulary" if difference == 0 else f"differ by at most {difference:.2g}"
    sentences.append(f"logits of the kept tokens {equal} on text of kept tokens")
    if found.bits_per_byte is not None:
        dense, pruned = found.bits_per_byte
        sentences.append(
            f"bits per byte of held-out text {fixed(dense)} → {fixed(pruned)}, each model in its own tokens"
        )
    compares = report.perplexity is not None or report.generation is not None
    return [*sentences, _BEFORE_CUT] if compares else sentences


def describe_source(source: VocabularySource, name_of: Callable[[str], str] = str) -> str:
    """Return ``web: 1.04× as many, 0.2213 → 0.2302 a byte, 61.2% of lines as before``."""
    before, after = (tokens / max(source.held_out_bytes, 1) for tokens in (source.tokens_before, source.tokens_after))
    same = percent(source.same_lines / source.lines)
    length = f"{times(source.longer)} as many, {before:.4f} → {after:.4f} a byte"
    return f"{name_of(source.name)}: {length}, {same} of lines as before"
