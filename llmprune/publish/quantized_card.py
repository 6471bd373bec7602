"""Model card of the result in its base's quantized format, in a repository of its own."""

from __future__ import annotations

from llmprune.checkpoint.quantized.formats import Quantization
from llmprune.publish.card import LIBRARY, TAGS, CardFacts, card_template, inherited_metadata
from llmprune.publish.public_names import public_name
from llmprune.publish.published import Published
from llmprune.results.formatting import interval_name, short_model_name, span
from llmprune.results.report_schema import Report


def write_quantized_card(
    repo_id: str, report: Report, *, facts: CardFacts, pruned: Published, quantization: Quantization
) -> str:
    """Return README.md, metadata and body. ``pruned``: the pushed unquantized result, which the card links."""
    from huggingface_hub import ModelCard, ModelCardData

    base = facts.base
    interval = report.retention.interval if report.retention else None
    body = card_template("quantized_card.md.j2").render(
        repo_id=repo_id,
        report=report,
        figures=report.requantized,
        pruned=pruned,
        package=quantization.package,
        base=base,
        base_name=public_name(base.name, local=base.commit is None),
        loading=facts.loading,
        refused=facts.refused,
        licence=base.card.get("license"),
        interval_name=interval_name([interval]),
        mean_interval=span(interval),
    )
    data = ModelCardData(
        base_model=pruned.repo_id,
        base_model_relation="quantized",
        library_name=LIBRARY,
        tags=[*TAGS, quantization.method],
        model_name=short_model_name(repo_id),
        **inherited_metadata(base),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").content)
