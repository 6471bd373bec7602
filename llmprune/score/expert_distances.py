"""Distances between the outputs of a layer's experts, to find those that can be merged.

    distance of experts i and j = Σ over tokens   g_i² ‖ f_i(x) − f_j(x) ‖²

It is the squared error of the layer if expert j answers in place of i with the weight g_i. All experts are run on
evenly spaced tokens, as many as cost one pass through the routed experts. The usage of an expert is
the sum of its routing weights over all tokens. (M-SMoE, arXiv 2310.01334, compares router scores, and HC-SMoE,
arXiv 2410.08589, mean outputs.)

Shapes: T tokens, K experts that a token is routed to, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.anatomy.expert_hooks import ExpertChoice, choice_in
from llmprune.common.linalg.precision import float64_device
from llmprune.score.scorer import Scorer
from llmprune.score.scores import Scores

_UNROUTED = 1e-6  # of a weight: experts without tokens are compared on those of others
_AT_ONCE = 2**24  # elements of outputs that are held


class ExpertDistanceScorer(Scorer):
    """Measures the distances of ``count`` experts that ``module`` holds, and their usage."""

    def __init__(self, key: str, module: nn.Module, *, count: int) -> None:
        self.key, self.count, self._module = key, count, module
        device = float64_device(next(module.parameters()).device)
        self.distance_EE = torch.zeros(count, count, dtype=torch.float64, device=device)
        self.usage_E = torch.zeros(count, dtype=torch.float64, device=device)

    def watch(self, hooks: ExitStack) -> None:
        """Read the routing, and run all experts on some of the tokens."""
        hooks.callback(self._module.register_forward_pre_hook(self._see, with_kwargs=True).remove)

    def _see(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:  # noqa: PLR0917 - torch calls it
        choice = choice_in(args, kwargs)
        assert choice is not None, "discovery has seen the routing"
        tokens, top_k = choice.index_TK.shape
        weight_TE = choice.weight_TK.new_zeros(tokens, self.count, dtype=torch.float32)
        weight_TE.scatter_add_(1, choice.index_TK.long(), choice.weight_TK.float())
        self.usage_E += weight_TE.sum(0, dtype=torch.float32).to(self.usage_E)
        forward, each = partial(type(module).forward, module), max(self.count // top_k, 1)
        some_T = torch.arange(0, tokens, each, device=weight_TE.device)
        for part_T in torch.split(some_T, max(_AT_ONCE // (self.count * choice.hidden_TD.shape[1]), 1)):
            hidden_SD = choice.hidden_TD[part_T].repeat_interleave(self.count, 0)
            index_S1 = torch.arange(self.count, device=part_T.device).repeat(len(part_T)).unsqueeze(1)
            alone = ExpertChoice(
                hidden_SD, index_S1.to(choice.index_TK.dtype), choice.weight_TK.new_ones(len(hidden_SD), 1)
            )
            output_SD = choice.run(forward, args, kwargs=kwargs, replaced=alone)
            self._add(output_SD.float().view(len(part_T), self.count, -1), weight_TE[part_T])

    def _add(self, output_TED: Tensor, weight_TE: Tensor) -> None:
        """Add the distances of some tokens."""
        product_TEE = output_TED @ output_TED.mT
        norm_TE = product_TEE.diagonal(dim1=1, dim2=2)
        distance_TEE = norm_TE.unsqueeze(2) + norm_TE.unsqueeze(1) - 2 * product_TEE
        weighted_EE = torch.einsum("te,tef->ef", weight_TE.square() + _UNROUTED, distance_TEE.clamp_min(0))
        self.distance_EE += weighted_EE.to(self.distance_EE)

    def reducible_state(self) -> list[Tensor]:
        """Return the sums of the distances and the usage."""
        return [self.distance_EE, self.usage_E]

    def write(self, scores: Sequence[Scores]) -> None:
        """Write them, the same for every source."""
        for one in scores:
            one.distances[self.key] = self.distance_EE.float().cpu()
            one.usage[self.key] = self.usage_E.float().cpu()
