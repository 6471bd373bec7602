"""Pack the texts and images of one source into token windows, with the model's own processor.

A window holds whole images: a text is cut at its end, never within an image. Where the next image does not fit, the
window is filled with the texts of the following rows, without their images.

Shapes in names: N windows, L sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmprune.common.errors import CalibrationError
from llmprune.data.image_processor import ImageDocument, ImageProcessor
from llmprune.data.image_rows import images_of
from llmprune.data.packing import Packed, Packing, Position, digest_of
from llmprune.data.sources import read_rows
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.text_source import TextSource

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PackedImages:
    """Windows of one source with their images. ``packed.windows_NL`` refers to ``images`` by −(k + 1)."""

    packed: Packed
    images: tuple[Any, ...]

    def after(self, images: int) -> Packed:
        """Return the windows as they refer to their images behind ``images`` others."""
        windows_NL = self.packed.windows_NL
        return replace(self.packed, windows_NL=windows_NL.where(windows_NL >= 0, windows_NL - images))


def pack_images(
    source: TextSource, processor: ImageProcessor, *, packing: Packing, windows: TokenWindows
) -> PackedImages:
    """Lay out a source's rows in ``packing.samples`` windows.

    Raises CalibrationError where a row cannot be read, where images are longer than a window, and where the rows are
    too few.
    """
    import torch

    filling = _Filling(packing)
    rows = too_long = 0
    for row in read_rows(source, seed=windows.seed):
        rows += 1
        images = images_of(row, source)
        document = processor.document(row, images, source=source)
        if document is None:
            continue
        if document.least > packing.content:
            too_long += 1
            continue
        filling.add(document)
        if filling.is_full:
            break
    else:
        raise _too_few(source, filling, rows=rows, too_long=too_long)
    windows_NL: Tensor = torch.tensor(filling.windows)
    packed = Packed(windows_NL, filling.crossings, len(filling.digests), Position(rows, 0), frozenset(filling.digests))
    return PackedImages(packed, tuple(filling.images))


@dataclass
class _Filling:
    """Windows while they are filled."""

    packing: Packing
    windows: list[list[int]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    digests: set[bytes] = field(default_factory=set)
    crossings: int = 0
    _open: list[int] = field(default_factory=list)
    _documents: int = 0  # in the open window

    @property
    def is_full(self) -> bool:
        return len(self.windows) == self.packing.samples

    def add(self, document: ImageDocument) -> None:
        """Add a document: with its images where they fit, else as text that fills the window."""
        if not self._open:
            self._open = list(self.packing.begin)
        room = self.packing.length - len(self._open)
        if document.least <= room:
            first = len(self.images)
            tokens = [token - first if token < 0 else token for token in document.tokens]
            self.images += document.images
        else:
            tokens = document.tokens[document.least :]
        tokens = (tokens + self.packing.separator)[:room]
        self._open += tokens
        self._documents += bool(tokens)
        self.digests.add(digest_of(document.text))
        if len(self._open) == self.packing.length:
            self.windows.append(self._open)
            self.crossings += self._documents > 1
            self._open, self._documents = [], 0


def _too_few(source: TextSource, filling: _Filling, *, rows: int, too_long: int) -> CalibrationError:
    packing = filling.packing
    longer = f"; {too_long} rows have images of more tokens than a window: raise sequence_length" if too_long else ""
    return CalibrationError(
        f"{source.dataset} ({source.split}) fills {len(filling.windows)} of {packing.samples} windows of "
        f"{packing.length} tokens with {rows:,} rows{longer}; ask for fewer samples, or add rows"
    )
