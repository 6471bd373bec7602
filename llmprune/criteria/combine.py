"""Rules by which the scores that several sources of text give become one score.

Sources differ in scale, so ranks are combined. The rank of a unit is the number of units with lower scores, plus half
the number of others with the same score.

- ``rank_mean``: the mean of the ranks by each source, Borda's count (Dwork et al., Rank Aggregation Methods for the
  Web, 2001). Each source has the same say, whatever its number of windows and the scale of its scores.
- ``worst``: the highest of the ranks by each source, so that what any source needs stays: the loss of the worst-off
  source is what counts, as in arXiv 1911.08731. Of units with equal highest ranks that with the higher mean stays.

``pooled`` combines nothing: all tokens are scored together.

Shapes: S sources, F units that are ranked: neurons of a unit, key-value groups, experts, layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Combine = Literal["pooled", "rank_mean", "worst"]


def combine_scores(scores: Sequence[Tensor], rule: Combine) -> Tensor:
    """Return one score of each unit from those by each source, all float32 […, F]; a single source's are returned.

    Units are ranked along the last dimension.
    """
    import torch

    if len(scores) == 1:
        return scores[0]
    return _RULES[rule](torch.stack([_doubled_ranks(scores_F) for scores_F in scores]))


def _mean(doubled_SF: Tensor) -> Tensor:
    mean_F: Tensor = doubled_SF.sum(0).float() / (2 * len(doubled_SF))
    return mean_F


def _highest(doubled_SF: Tensor) -> Tensor:
    more_than_any_sum = 2 * len(doubled_SF) * doubled_SF.shape[-1]
    return _doubled_ranks(doubled_SF.amax(0) * more_than_any_sum + doubled_SF.sum(0)).float() / 2


def _doubled_ranks(scores_F: Tensor) -> Tensor:
    """Return twice the rank of each score along the last dimension, int64: units below, and units not above."""
    import torch

    ascending_F = scores_F.sort(-1).values.contiguous()
    scores_F = scores_F.contiguous()
    below_F = torch.searchsorted(ascending_F, scores_F)
    not_above_F: Tensor = torch.searchsorted(ascending_F, scores_F, right=True)
    return below_F + not_above_F - 1


_RULES: dict[Combine, Callable[[Tensor], Tensor]] = {"rank_mean": _mean, "worst": _highest}
