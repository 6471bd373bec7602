"""LinearPatch: one matrix between the layers around a removed block aligns the magnitudes of the residual stream.

The patch is Q diag(d) Qᵀ with Q an orthonormal Hadamard matrix and d the ratio of the mean absolute values, channel by
channel, of the rotated stream behind the block and before it; ratios are averaged over windows. The block has the
highest cosine similarity among those between the first and the last layer. The matrix acts on the whole stream, so it
stays a module of its own. Chen et al. 2025, https://arxiv.org/abs/2505.24680 (without its distillation)

Shapes in names: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peer_methods.base import Peer, Trace
from peer_methods.similarity import SpanDistances, cosine_distance, nearest_block
from peer_methods.surgery import map_output, remove_layers


class LinearPatch(Peer):
    """A block of layers replaced by a rotated diagonal scaling."""

    removes = "layers"

    def __init__(self, amounts: Sequence[int]) -> None:
        """Measure spans, and ratios of magnitudes."""
        super().__init__(amounts)
        self._distances = SpanDistances(self.amounts, cosine_distance)
        self._ratios: dict[tuple[int, int], Tensor] = {}  # first layer, length -> sum over windows [D]
        self._windows = 0

    def observe(self, trace: Trace) -> None:
        """Add a batch."""
        self._distances.add(trace)
        rotation_DD = hadamard(trace.hidden_BLD[0].shape[-1])
        magnitudes_BD = [(hidden_BLD @ rotation_DD).abs().mean(1) for hidden_BLD in trace.hidden_BLD]
        for amount in self.amounts:
            for start in range(1, len(magnitudes_BD) - 1 - amount):
                ratio_D = (magnitudes_BD[start + amount] / magnitudes_BD[start]).double().sum(0)
                self._ratios[start, amount] = self._ratios.get((start, amount), 0) + ratio_D
        self._windows += len(magnitudes_BD[0])

    def prune(self, model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[int]:
        """Remove the block, and patch the layer before it."""
        starts = range(1, len(model.model.layers) - amount)
        start = nearest_block(self._distances.of_span(amount), starts)
        scale_D = self._ratios[start, amount] / self._windows
        rotation_DD = hadamard(len(scale_D)).double()
        map_output(model.model.layers[start - 1], (rotation_DD * scale_D) @ rotation_DD.T)
        removed = list(range(start, start + amount))
        remove_layers(model, removed)
        return removed


def hadamard(size: int) -> Tensor:
    """Return an orthonormal Hadamard matrix [D, D]: Sylvester's doubling of one entry, or of Paley's first matrix.

    Paley's first matrix has the size q + 1 for a prime q = 3 modulo 4. Raises ValueError where no such size times a
    power of two is the wanted one.
    """
    seeds = [seed for seed in range(4, size + 1, 4) if size % seed == 0 and _prime(seed - 1)]
    seeds = [seed for seed in (1, *seeds) if (size // seed).bit_count() == 1]
    if not seeds:
        raise ValueError(f"no Hadamard matrix of size {size} is known here")
    matrix = torch.ones(1, 1) if seeds[0] == 1 else _paley(seeds[0] - 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix.div(size**0.5)


def _prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))


def _paley(prime: int) -> Tensor:
    """Return Paley's first Hadamard matrix, I + S with S skew-symmetric: quadratic residues of the differences."""
    residues = {number * number % prime for number in range(1, prime)}
    characters = torch.tensor([0.0] + [1.0 if number in residues else -1.0 for number in range(1, prime)])
    index = torch.arange(prime)
    skew = torch.zeros(prime + 1, prime + 1)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = characters[(index[:, None] - index) % prime]
    return torch.eye(prime + 1) + skew
