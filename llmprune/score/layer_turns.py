"""By how much layers turn what the head reads, were the model's hidden states read there.

    turn of layers a … b = 1 − mean over tokens of cos( norm(hidden before layer a), norm(hidden after layer b) )

It is the block influence (ShortGPT, arXiv 2403.03853) of a span, with the model's final norm before the cosine.

With the final norm in between, no channel outweighs the others, as some do in Gemma 3. The turn says how much a repair
has to make up for, the divergence without the layers how much is lost without one.

Shapes: C candidates, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from llmprune.common.distributed import sum_over_processes
from llmprune.criteria.accumulators.mean_over_tokens import cosine
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.head_inputs import head_inputs

Layers = tuple[int, ...]


@torch.no_grad()
def turns_of(candidates: Collection[Layers], start: LayerwiseForward) -> dict[Layers, float]:
    """Return the turn of each candidate, ascending layers; that of several spans is the sum of theirs.

    ``start``: a forward pass before the first layer, of which the tokens count that are targets. All turns are 0 of a
    model without a head of its own.
    """
    decoder, current = start.decoder, start.on(start.copy())
    if decoder.skeleton.get_output_embeddings() is None:
        return dict.fromkeys(candidates, 0.0)
    read: dict[int, list[Tensor]] = {edge: [] for one in candidates for span in _spans(one) for edge in span}
    for index in range(len(decoder) + 1):
        if index in read:
            read[index] = list(_counted(current))
        if index < len(decoder):
            with decoder.layer(index) as layer:
                current.pass_through(index, layer)
    total_C = torch.zeros(len(candidates), dtype=torch.float64)
    tokens = torch.tensor(float(sum(map(len, next(iter(read.values()), [])))), dtype=torch.float64)
    for number, one in enumerate(candidates):
        for before, after in _spans(one):
            for first_TD, last_TD in zip(read[before], read[after], strict=True):
                total_C[number] += (1 - cosine(first_TD, last_TD)).double().sum().cpu()
    sum_over_processes([total_C, tokens])
    return dict(zip(candidates, (total_C / tokens).tolist(), strict=True))


def _spans(layers: Layers) -> Iterator[tuple[int, int]]:
    """Yield the first of each run of consecutive layers, and the layer after it."""
    start = layers[0]
    for layer, following in zip(layers, (*layers[1:], -1), strict=True):
        if following != layer + 1:
            yield start, layer + 1
            start = following


def _counted(forward: LayerwiseForward) -> Iterator[Tensor]:
    """Yield what the head reads where it predicts a token that counts, float32 [T, D], batch by batch."""
    for batch, input_BLD in enumerate(head_inputs(forward)):
        counted_BT = forward.targets.of(batch, input_BLD.device)
        predicting_BTD = input_BLD[:, :-1].float()
        yield predicting_BTD.flatten(0, 1) if counted_BT is None else predicting_BTD[counted_BT]
