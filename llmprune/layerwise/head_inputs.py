"""What a model's head reads of hidden states, without the logits: those after the final norm.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from llmprune.anatomy.hooks import inputs_of
from llmprune.layerwise.forward import LayerwiseForward


class _ReachedHeadError(Exception):
    """The head is about to be called."""


def head_inputs(forward: LayerwiseForward) -> Iterator[Tensor]:
    """Yield the input [B, L, D] of the head for the current hidden states, batch by batch."""
    head = forward.decoder.skeleton.get_output_embeddings()
    for batch in range(len(forward.batches)):
        seen: list[Tensor] = []

        def stop(value: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(value)
            raise _ReachedHeadError

        try:
            with inputs_of(head, stop):
                forward.logits(batch)
        except _ReachedHeadError:
            yield seen[0]
