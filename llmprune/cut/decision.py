"""The pruning decision as a value: which layers, neurons, key-value groups, experts and tokens are kept.

Pure functions choose it from scores and sizes. It is saved as ``cut.json``, with its index tensors in
``cut.safetensors``. The next run of the recipe reads it, also after it was edited by hand.

Shapes: N layers, F neurons of a unit, G key-value groups, E experts, K neurons, groups, channels or tokens kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.common.errors import RecipeError
from llmprune.common.files import write_atomically, write_text

_KINDS = ("neurons", "experts", "heads", "merged", "usage")
_HIDDEN, _VOCABULARY = "hidden", "vocabulary"  # names of their tensors in the file


@dataclass(frozen=True)
class Cut:
    """Kept layers, neurons, key-value groups, experts and channels of a model with ``num_layers`` layers.

    ``layers``: indices kept, ascending. ``widths``: neurons kept, by config field, of narrowed units only.
    ``num_experts``, ``kv_groups``: experts and key-value groups kept in each layer; None if all are. By ``unit_key``:
    ``neurons``, indices kept, int64 [K], or [E, K] with different ones in each expert; ``experts``, indices kept, int64
    [num_experts]; ``heads``, indices of the groups kept, int64 [kv_groups]. ``hidden``: ascending indices of the
    residual channels kept in the whole model, int64 [K]; ``vocabulary``: ids of the tokens kept, ascending, int64 [K];
    None if all are. Where removed experts are merged: ``merged``, the kept expert that each expert is merged into,
    int64 [E]; ``usage``, its weight there, [E]. Raises RecipeError for impossible layers.
    """

    num_layers: int
    layers: tuple[int, ...]
    widths: dict[str, int] = field(default_factory=dict)
    neurons: dict[str, Tensor] = field(default_factory=dict)
    num_experts: int | None = None
    experts: dict[str, Tensor] = field(default_factory=dict)
    kv_groups: int | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    merged: dict[str, Tensor] = field(default_factory=dict)
    usage: dict[str, Tensor] = field(default_factory=dict)
    vocabulary: Tensor | None = None

    def __post_init__(self) -> None:
        indices = all(type(index) is int for index in self.layers)
        valid = indices and sorted(set(self.layers)) == list(self.layers) and self.layers
        if not valid or self.layers[0] < 0 or self.layers[-1] >= self.num_layers:
            raise RecipeError(
                f"a cut keeps at least one of layers 0 to {self.num_layers - 1}, each once and in order; "
                f"this one keeps {list(self.layers)}"
            )

    def require_like(self, chosen: Cut) -> None:
        """Raise RecipeError unless this cut, which may be edited by hand, has the sizes of ``chosen``."""
        if self.num_layers != chosen.num_layers:
            raise RecipeError(
                f"cut.json is for {self.num_layers} layers and the model has {chosen.num_layers}; delete it"
            )
        if self.tokens != chosen.tokens:
            raise RecipeError(
                f"cut.json keeps {self.tokens or 'all'} tokens, and the recipe {chosen.tokens or 'all'}; delete it"
            )
        if replace(self.sizes, layers=chosen.layers) != chosen.sizes or _shapes(self) != _shapes(chosen):
            found, wanted = (
                f"widths {cut.widths}, hidden_size {cut.hidden_size}, num_experts {cut.num_experts} and kv_groups "
                f"{cut.kv_groups}"
                for cut in (self, chosen)
            )
            raise RecipeError(
                f"cut.json has {found}, and the recipe keeps {wanted}: only its layers can be edited; "
                "for other neurons, experts, heads or channels change width, experts and hidden in the recipe"
            )

    @property
    def sizes(self) -> KeptSizes:
        """Sizes of the pruned model."""
        return KeptSizes(self.layers, self.widths, self.num_experts, self.kv_groups, self.hidden_size)

    @property
    def hidden_size(self) -> int | None:
        """Number of residual channels kept; None if all are."""
        return None if self.hidden is None else len(self.hidden)

    @property
    def with_all_channels(self) -> Cut:
        """The same cut without the removal of residual channels."""
        return replace(self, hidden=None)

    @property
    def tokens(self) -> int | None:
        """Number of tokens kept; None if all are."""
        return None if self.vocabulary is None else len(self.vocabulary)

    @property
    def removed(self) -> tuple[int, ...]:
        """Indices of the removed layers."""
        return tuple(index for index in range(self.num_layers) if index not in self.layers)

    @property
    def is_empty(self) -> bool:
        """True if nothing is removed from the layers."""
        return not (self.removed or self.neurons or self.experts or self.heads) and self.hidden is None

    def save(self, path: Path, *, reason: Mapping[str, Any] | None = None) -> None:
        """Write ``cut.json`` and, if more than layers is removed, ``cut.safetensors`` in the same folder.

        ``reason``: why these sizes were chosen, for a person who reads the file.
        """
        listed = path.with_suffix(".safetensors")
        indices = {f"{kind}.{key}": keep for kind in _KINDS for key, keep in getattr(self, kind).items()}
        if self.hidden is not None:
            indices[_HIDDEN] = self.hidden
        if self.vocabulary is not None:
            indices[_VOCABULARY] = self.vocabulary
        text: dict[str, Any] = {
            "num_layers": self.num_layers,
            "keep_layers": list(self.layers),
            "remove_layers": list(self.removed),
            "widths": self.widths,
            "num_experts": self.num_experts,
            "kv_groups": self.kv_groups,
            "hidden_size": self.hidden_size,
            "tokens": self.tokens,
            "indices": listed.name if indices else None,
        }
        if reason:
            text["search"] = dict(reason)
        if indices:
            write_atomically(listed, lambda temporary: save_file(indices, temporary))
        write_text(path, json.dumps(text, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Cut:
        """Read a saved cut; its layers are those of ``keep_layers``. Raises RecipeError if it cannot be read."""
        try:
            text = json.loads(path.read_text(encoding="utf-8"))
            indices = load_file(path.with_name(text["indices"])) if text["indices"] else {}
            kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
            hidden_K = indices.pop(_HIDDEN, None)
            vocabulary = indices.pop(_VOCABULARY, None)
            for name, keep in indices.items():
                kind, _, key = name.partition(".")
                kinds[kind][key] = keep
            return cls(
                int(text["num_layers"]),
                tuple(text["keep_layers"]),
                dict(text["widths"]),
                kinds["neurons"],
                text["num_experts"],
                kinds["experts"],
                text["kv_groups"],
                kinds["heads"],
                hidden_K,
                kinds["merged"],
                kinds["usage"],
                vocabulary,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"{path} cannot be read as a cut ({type(error).__name__}: {error}); delete it to choose a new one"
            ) from error


def _shapes(cut: Cut) -> dict[str, tuple[int, ...]]:
    return {f"{kind}.{key}": tuple(keep.shape) for kind in _KINDS for key, keep in getattr(cut, kind).items()}


def choose_layers(scores_N: Tensor, keep: int, *, one_of: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the ``keep`` layers with the highest scores, ascending; of equal scores the earlier layer is kept.

    At least one of ``one_of`` is kept, if that is not empty.
    """
    order = torch.sort(scores_N, descending=True, stable=True).indices.tolist()
    kept = order[:keep]
    if one_of and not set(one_of) & set(kept):
        kept[-1] = next(index for index in order if index in set(one_of))
    return tuple(sorted(kept))


def choose_highest(scores: Tensor, keep: int) -> Tensor:
    """Return the ascending indices of the ``keep`` highest scores along the last dimension: [F], [E, F], [E], [G]."""
    return scores.topk(keep).indices.sort().values


def choose_in_groups(scores_E: Tensor, keep: int, *, groups: int) -> Tensor:
    """Return the ascending indices of the ``keep`` highest scores, as many of each group of consecutive experts."""
    chosen_GK = choose_highest(scores_E.view(groups, -1), keep // groups)
    return (chosen_GK + torch.arange(groups).unsqueeze(1) * (len(scores_E) // groups)).flatten()


def kept_share(scores: Tensor, keep: Tensor, *, is_additive: bool = True) -> float:
    """Return the share of the total score that kept neurons or groups have: scores [F], [E, F]; indices [K], [E, K].

    Scores that do not add up are cumulative, each the loss of all units removed up to that one: the highest removed
    score is then the total that is lost.
    """
    scores = scores.double()
    if not is_additive:
        removed = scores.scatter(-1, keep, 0.0).amax(-1).sum()
        return float(1 - removed / scores.amax(-1).sum()) if scores.any() else 1.0
    total = scores.sum()
    return float(scores.gather(-1, keep).sum() / total) if total > 0 else 1.0


def gap_after(layers: Sequence[int], position: int, *, num_layers: int) -> range:
    """Return the removed layers between the kept layer at a position and the next kept one, or the end."""
    following = layers[position + 1] if position + 1 < len(layers) else num_layers
    return range(layers[position] + 1, following)
