"""Begin-of-text tokens in a plan: what windows begin with, and a warning for ready tokens that lack it."""

from __future__ import annotations

from llmprune.data.begin_of_text import begins, describe_begin, required_begin
from llmprune.data.windows import TextWindows
from llmprune.planning.texts.text_inputs import TextInputs
from llmprune.results.formatting import plural


def planned_begin(inputs: TextInputs) -> str | None:
    """Return what calibration windows begin with, as ``<bos> (2)``; None for nothing.

    Also None where the tokenizer is not on this machine: a plan downloads only the config from the hub.
    """
    calibration = inputs.recipe.calibration
    if calibration.tokens:
        return describe_begin(inputs.calibration_text.begin, inputs.tokenizer)
    if not inputs.has_own_tokenizer:
        return None
    return describe_begin(required_begin(calibration.bos, inputs.tokenizer), inputs.tokenizer)


def about_begin(inputs: TextInputs) -> list[str]:
    """Return a warning for each file of ready tokens that lacks the begin-of-text token of the tokenizer."""
    calibration, held_out = inputs.recipe.calibration, inputs.recipe.evaluation.perplexity
    notes = [_about_lacking("calibration", inputs.calibration_text, inputs=inputs)] if calibration.tokens else []
    if held_out and held_out.tokens and inputs.held_out_text:
        notes.append(_about_lacking("evaluation.perplexity", inputs.held_out_text, inputs=inputs))
    return [note for note in notes if note]


def _about_lacking(place: str, text: TextWindows, *, inputs: TextInputs) -> str | None:
    if not text.lacking:
        return None
    count = int((~begins(text.windows_NL, text.lacking)).sum())
    measured = "scores and repairs" if place == "calibration" else "perplexity, divergence and generated texts"
    return (
        f"{place}.tokens: {count} of {plural(len(text.windows_NL), 'window')} do not begin with "
        f"{describe_begin(text.lacking, inputs.tokenizer)}, which the tokenizer puts in front of every text. A model "
        "that was trained with it may predict far worse without (Gemma 3 of 270 M parameters on WikiText: perplexity "
        f"62 in place of 23), and {measured} are then those of a disturbed model; set {place}.bos: true to put it in "
        "front, or false if the model was trained without"
    )
