"""Tools of the proofs that discovery runs on small models with random weights."""

from __future__ import annotations

from torch import Tensor

# Errors of a module that cannot be run on hidden states alone, or not with the tensors of a proof.
RUN_ERRORS = (TypeError, RuntimeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError)


def equal_up_to_rounding(value: Tensor, reference: Tensor, *, tolerance: float = 1e-4) -> bool:
    """Check that no element differs by more than ``tolerance`` times the largest magnitude of the reference."""
    limit = tolerance * reference.abs().max().clamp_min(1e-6)
    return bool((value - reference).abs().max() <= limit)


def hidden_states_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the hidden states in a module's output, which may be a tuple that starts with them."""
    return output[0] if isinstance(output, tuple) else output


class ActivationShape:
    """Shape of the last activations at the input of a unit's output projection.

    ``has_width``: they have ``width`` channels; ``has_every_token``: there is a row for each of ``tokens`` tokens.
    """

    def __init__(self, width: int, tokens: int) -> None:
        self.has_width = self.has_every_token = False
        self._width, self._tokens = width, tokens

    def note(self, activation: Tensor) -> None:
        """Record the shape of activations [..., F]."""
        self.has_width = activation.shape[-1] == self._width
        self.has_every_token = activation.shape[:-1].numel() == self._tokens
