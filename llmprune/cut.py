"""The decision as a value: which layers and which neurons stay.

Pure functions choose it from scores and targets. It is saved as readable JSON,
with the long lists of neuron indices in safetensors beside it; edited by hand
and run again, it is replayed.

Shapes: N layers, F neurons of a unit, K neurons kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.errors import RecipeError
from llmprune.files import write_beside, write_text
from llmprune.scores import Scores


@dataclass(frozen=True)
class Cut:
    """``layers``: indices kept, ascending; ``neurons``: indices kept, int64 [K], by ``unit_key``."""

    num_layers: int
    layers: tuple[int, ...]
    width: int | None
    neurons: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        indices = all(type(index) is int for index in self.layers)
        valid = indices and sorted(set(self.layers)) == list(self.layers) and self.layers
        if not valid or self.layers[0] < 0 or self.layers[-1] >= self.num_layers:
            raise RecipeError(
                f"a cut keeps at least one of layers 0 to {self.num_layers - 1}, each once and in order; "
                f"this one keeps {list(self.layers)}"
            )

    def require_fits(self, num_layers: int, width: int | None) -> None:
        """Raise RecipeError unless this cut is of a model and to a width like these: it may be edited by hand."""
        if self.num_layers != num_layers:
            raise RecipeError(f"cut.json is for {self.num_layers} layers and the model has {num_layers}; delete it")
        if self.width != width or any(len(keep_K) != width for keep_K in self.neurons.values()):
            raise RecipeError(
                f"cut.json says mlp_width {self.width} and the recipe keeps {width} neurons: "
                "which neurons stay is not edited there; change width in the recipe"
            )

    @property
    def removed(self) -> tuple[int, ...]:
        """Indices of the layers that go."""
        return tuple(index for index in range(self.num_layers) if index not in self.layers)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is cut at all."""
        return not self.removed and not self.neurons

    def save(self, path: Path) -> None:
        """Write ``cut.json`` and, where neurons are cut, ``cut.safetensors`` beside it."""
        listed = path.with_suffix(".safetensors")
        text = {
            "num_layers": self.num_layers,
            "keep_layers": list(self.layers),
            "remove_layers": list(self.removed),
            "mlp_width": self.width,
            "neurons": listed.name if self.neurons else None,
        }
        if self.neurons:
            write_beside(listed, lambda beside: save_file(self.neurons, beside))
        write_text(path, json.dumps(text, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Cut:
        """Read what ``save`` wrote, or what a person made of it: ``keep_layers`` counts."""
        try:
            text = json.loads(path.read_text(encoding="utf-8"))
            neurons = load_file(path.with_name(text["neurons"])) if text["neurons"] else {}
            return cls(int(text["num_layers"]), tuple(text["keep_layers"]), text["mlp_width"], neurons)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"{path} is no cut that can be read ({type(error).__name__}: {error}); delete it to choose anew"
            ) from error


def choose_layers(scores_N: Tensor, keep: int, one_of: Sequence[int] = ()) -> tuple[int, ...]:
    """The ``keep`` layers with the highest scores, ascending; of equal scores the earlier layer stays.

    Of ``one_of``, if there are any, at least one stays.
    """
    order = torch.sort(scores_N, descending=True, stable=True).indices.tolist()
    kept = order[:keep]
    if one_of and not set(one_of) & set(kept):
        kept[-1] = next(index for index in order if index in set(one_of))
    return tuple(sorted(kept))


def choose_neurons(scores: Scores, keep: int) -> dict[str, Tensor]:
    """The ``keep`` neurons with the highest scores of every unit, ascending."""
    return {key: scores_F.topk(keep).indices.sort().values.cpu() for key, scores_F in scores.neurons.items()}


def round_width(wanted: float, width: int, multiple: int | None = None) -> int:
    """The width nearest to the wanted one that hardware likes.

    A multiple of 128, or of the largest power of two that divides the original.
    """
    step = multiple or width_step(width)
    return min(max(round(wanted / step), 1) * step, width)


def width_step(width: int) -> int:
    """128, or the largest power of two that divides the width if that is less."""
    return min(width & -width, 128)


def kept_share(scores_F: Tensor, keep_K: Tensor) -> float:
    """Share of the score mass that the kept neurons hold."""
    total = scores_F.double().sum()
    return float(scores_F.double()[keep_K].sum() / total) if total > 0 else 1.0


def gap_after(layers: Sequence[int], position: int, num_layers: int) -> range:
    """The removed layers between a kept layer and the next one, or the end."""
    following = layers[position + 1] if position + 1 < len(layers) else num_layers
    return range(layers[position] + 1, following)
