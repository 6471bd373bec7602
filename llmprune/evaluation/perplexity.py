"""Perplexity and divergence of next-token distributions on held-out text, by layer-wise forward passes.

Memory: one layer, the hidden states of two models, and one chunk of their logits (``layerwise.logits``).

A begin-of-text token is an input and never a target, because a model is not asked to predict where a text begins: the
prediction of the one in front of a document inside a window is left out of every figure. The token after it counts.

Shapes: N windows, n those of this process, B batch, L sequence length, T = L - 1 predicted tokens of a window, P
positions of a chunk, V vocabulary, C predicted tokens that count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmprune.common.distributed import rank, sum_over_processes, world_size
from llmprune.common.errors import NumericalError
from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.common.progress import track
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.layerwise.logits import TokenChunk, token_chunks
from llmprune.results.figures.evaluation import DivergenceFigures

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class ComparedPredictions:
    """Perplexity of both models, and the divergence of their next-token distributions."""

    dense_perplexity: float
    pruned_perplexity: float
    divergence: DivergenceFigures


@torch.no_grad()
def perplexity(
    decoder: Decoder,
    windows_NL: Tensor,
    *,
    batch_size: int,
    name: str,
    store: HiddenStateStore | None = None,
    begin: tuple[int, ...] = (),
) -> float:
    """Return exp of the mean next-token cross entropy over all windows; infinity if that overflows.

    ``name`` identifies the model in messages; ``begin``: ids that are no targets. With several processes each takes
    some of the batches, and all return the value that one process would. Raises NumericalError if logits are NaN or
    infinite.
    """
    share = _Share(windows_NL, batch_size, begin=begin)
    losses_NT = share.empty(decoder)
    if share:
        forward = _completed_forward(decoder, share, name=name, store=store)
        for batch in range(len(forward.batches)):
            ids_BL, hidden_BLD = forward.token_ids(batch), forward.hidden_states.at(batch, decoder.device)
            for chunk in token_chunks(forward, ids_BL):
                logits_BPV = chunk.next_token_logits(forward, ids_BL, hidden_BLD=hidden_BLD)
                share.put(losses_NT, _losses(logits_BPV, chunk.targets(ids_BL)), batch=batch, chunk=chunk)
    return _exp_mean(share.gather(losses_NT), name=name)


@torch.no_grad()
def compare_predictions(
    dense: Decoder,
    pruned: Decoder,
    *,
    windows_NL: Tensor,
    batch_size: int,
    store: HiddenStateStore | None = None,
    begin: tuple[int, ...] = (),
) -> ComparedPredictions:
    """Return the perplexity of both models, and KL(dense ‖ pruned) over all next-token distributions.

    Processes share the batches, and ``begin`` is left out, as in ``perplexity``. Raises NumericalError if logits of
    either model are NaN or infinite.
    """
    share = _Share(windows_NL, batch_size, begin=begin)
    dense_losses_NT, pruned_losses_NT, divergences_NT, same_first_NT = (share.empty(dense) for _ in range(4))
    if share:
        first = _completed_forward(dense, share, name="dense", store=store)
        second = _completed_forward(pruned, share, name="pruned", store=store)
        for batch in range(len(first.batches)):
            ids_BL, other_ids_BL = first.token_ids(batch), second.token_ids(batch)
            before_BLD = first.hidden_states.at(batch, dense.device)
            after_BLD = second.hidden_states.at(batch, pruned.device)
            for chunk in token_chunks(first, ids_BL):
                targets_BP = chunk.targets(ids_BL)
                dense_BPV = chunk.next_token_logits(first, ids_BL, hidden_BLD=before_BLD)
                compared_BPV = chunk.next_token_logits(second, other_ids_BL, hidden_BLD=after_BLD).to(dense_BPV.device)
                for values_NT, values_BP in (
                    (dense_losses_NT, _losses(dense_BPV, targets_BP)),
                    (pruned_losses_NT, _losses(compared_BPV, targets_BP)),
                    (divergences_NT, kl_divergence(dense_BPV, compared_BPV)),
                    (same_first_NT, dense_BPV.argmax(-1) == compared_BPV.argmax(-1)),
                ):
                    share.put(values_NT, values_BP, batch=batch, chunk=chunk)
    return ComparedPredictions(
        _exp_mean(share.gather(dense_losses_NT), name="dense"),
        _exp_mean(share.gather(pruned_losses_NT), name="pruned"),
        _divergence_figures(share.gather(divergences_NT).double(), int(share.gather(same_first_NT).sum())),
    )


class _Share:
    """Held-out windows of this process: every ``world_size``-th batch, so that batches are those of one process.

    Values of tokens stay on the device until ``gather``, which is the only wait. A process has no window where there
    are fewer batches than processes. ``begin``: ids whose prediction does not count.
    """

    def __init__(self, windows_NL: Tensor, batch_size: int, *, begin: tuple[int, ...]) -> None:
        batches = torch.split(torch.arange(len(windows_NL)), batch_size)[rank() :: world_size()]
        self.batch_size = batch_size
        self._rows_n = torch.cat(batches) if batches else torch.zeros(0, dtype=torch.int64)
        self.windows_nL, self._shape_NL = windows_NL[self._rows_n], windows_NL.shape
        targets_NT = windows_NL[:, 1:]
        self._counts_NT = torch.isin(targets_NT, targets_NT.new_tensor(begin), invert=True)

    def __bool__(self) -> bool:
        return len(self._rows_n) > 0

    def empty(self, decoder: Decoder) -> Tensor:
        """Return zeros for a value of every predicted token of this process, on the decoder's device."""
        return torch.zeros(len(self._rows_n), self._shape_NL[1] - 1, device=decoder.device)

    def put(self, values_nT: Tensor, values_BP: Tensor, *, batch: int, chunk: TokenChunk) -> None:
        """Put the values of a chunk's predicted tokens in their places."""
        first = batch * self.batch_size
        values_nT[first + chunk.windows.start : first + chunk.windows.stop, chunk.positions] = values_BP

    def gather(self, values_nT: Tensor) -> Tensor:
        """Return the values that count, of all processes, on the CPU and in the order of the windows, float32 [C]."""
        gathered_NT = torch.zeros(self._shape_NL[0], self._shape_NL[1] - 1)
        gathered_NT[self._rows_n] = values_nT.cpu()
        sum_over_processes([gathered_NT])  # exact: all but one summand are zero
        return gathered_NT[self._counts_NT]


def _divergence_figures(divergences_C: Tensor, same_first: int) -> DivergenceFigures:
    # torch.quantile accepts at most 16 million values
    sorted_C = divergences_C.sort().values
    indices = {str(share): min(math.ceil(share * len(sorted_C)), len(sorted_C)) - 1 for share in QUANTILES}
    return DivergenceFigures(
        mean=float(divergences_C.mean()),
        quantiles={share: float(sorted_C[index]) for share, index in indices.items()},
        same_first=same_first / len(divergences_C),
        tokens=len(divergences_C),
    )


def _completed_forward(
    decoder: Decoder, share: _Share, *, name: str, store: HiddenStateStore | None
) -> LayerwiseForward:
    """Return a layer-wise forward pass that has completed all layers."""
    forward = LayerwiseForward(decoder, share.windows_nL, batch_size=share.batch_size, store=store)
    for index in track(range(len(decoder)), f"held-out text: {name}"):
        with decoder.layer(index) as layer:
            forward.pass_through(index, layer)
    decoder.drop_held_and_next()
    return forward


def _losses(logits_BPV: Tensor, targets_BP: Tensor) -> Tensor:
    """Return next-token cross entropies, float32 [B, P]; infinity only for tokens that the model masks."""
    targets_T = targets_BP.flatten().to(logits_BPV.device)
    losses_T = cross_entropy(logits_BPV.flatten(0, 1).float(), targets_T, reduction="none")
    return losses_T.view(targets_BP.shape)


def _exp_mean(losses_C: Tensor, *, name: str) -> float:
    if losses_C.isnan().any():
        raise NumericalError(
            f"held-out text, {name} model: its logits are NaN or infinite; try model.dtype: float32 or bfloat16, and "
            "check the checkpoint's weights"
        )
    mean = float(losses_C.double().mean())
    return math.exp(mean) if mean < 700 else math.inf
