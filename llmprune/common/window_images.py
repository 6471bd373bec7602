"""Images in token windows.

A window has a reference in place of each placeholder token of an image: −(k + 1) for image k. So windows stay
tensors of one shape that can be chosen, divided and stored, and a batch of them still says which images it needs.

Shapes: B windows of a batch, L sequence length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ImagesOfWindow = list[Any]  # PIL images in their order


@dataclass(frozen=True)
class WindowImages:
    """The images that windows refer to, and the model's own preparation of them.

    ``placeholder``: the token whose embeddings the model replaces by features of an image. ``prepare``: makes the
    model's inputs from the images of several windows, each of which has one at least. ``is_nested``: they have a
    row for each window; otherwise they are those of all images, one after the other. ``marks``: inputs of the shape
    [B, L] that have this value at placeholder tokens and 0 elsewhere.
    """

    images: tuple[Any, ...]
    placeholder: int
    prepare: Callable[[Sequence[ImagesOfWindow]], Mapping[str, Tensor]]
    is_nested: bool
    marks: Mapping[str, int]

    def fingerprint(self) -> str:
        """Return the SHA-256 of all pixels."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(repr((image.size, image.mode)).encode() + image.tobytes())
        return digest.hexdigest()

    def plain(self, ids: Tensor) -> Tensor:
        """Return token ids of any shape with the placeholder token in place of references."""
        return ids.where(ids >= 0, self.placeholder)

    def model_inputs(self, ids_BL: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the model's forward for a batch; of windows without images the ids alone."""
        found = [[self.images[-reference - 1] for reference in _references(ids_L)] for ids_L in ids_BL.tolist()]
        inputs = {"input_ids": self.plain(ids_BL)}
        if not any(found):
            return inputs
        marked_BL = (ids_BL < 0).long()
        return inputs | {name: marked_BL * value for name, value in self.marks.items()} | self._prepared(found)

    def _prepared(self, found: Sequence[ImagesOfWindow]) -> dict[str, Tensor]:
        prepared = dict(self.prepare([images for images in found if images]))
        if not self.is_nested:
            return prepared
        places = [place for place, images in enumerate(found) if images]
        return {name: _spread(rows, places, count=len(found)) for name, rows in prepared.items()}


def _references(ids_L: Sequence[int]) -> list[int]:
    """Return the references of one window, each once, in their order."""
    return list(dict.fromkeys(token for token in ids_L if token < 0))


def _spread(rows: Tensor, places: Sequence[int], *, count: int) -> Tensor:
    """Return ``count`` rows: these at ``places``, and zeros for windows without images."""
    spread = rows.new_zeros(count, *rows.shape[1:])
    spread[list(places)] = rows
    return spread
