"""Place of a source's text, in words."""

from __future__ import annotations

from llmprune.results.figures.calibration import CalibrationSource


def describe_text(source: CalibrationSource) -> str:
    """Return the place of a source's text, as ``PLACE (CONFIG, SPLIT)``; for text of the model itself a sentence."""
    if source.text is None:
        return "sampled from the dense model"
    details = ", ".join(part for part in (source.config, source.split) if part)
    return f"{source.text} ({details})" if details else source.text
