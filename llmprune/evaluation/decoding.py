"""Generation by the caller's settings alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def default_settings(model: PreTrainedModel) -> Iterator[None]:
    """Take the model's own generation settings away for a while.

    ``generate`` fills what its caller leaves open from them: penalties, beams, an early end, or a kind of search that
    needs code from the hub.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
