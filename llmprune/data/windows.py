"""Pack text into token windows, reproducibly, and fingerprint them.

Documents are shuffled with the seed, tokenised without special tokens, joined and cut into windows of L tokens that do
not overlap. A window may hold parts of several documents, which then attend to each other: such windows are counted,
and ``documents: separate`` avoids them. Text that gives fewer windows than were asked for is an error; no document is
repeated.

Where the tokenizer begins a text with a begin-of-text token, or the recipe asks for one, each window begins with it,
and so does each document after an end-of-text token. Documents that are joined by a blank line are one text, which
begins once. The token counts in L.

Shapes in names: N windows, L sequence length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.common.errors import CalibrationError, did_you_mean
from llmprune.common.window_images import WindowImages
from llmprune.data.begin_of_text import begins, required_begin, with_begin
from llmprune.data.image_processor import ImageProcessor
from llmprune.data.image_windows import pack_images
from llmprune.data.packing import Packed, Packing, pack, separator_ids
from llmprune.data.window_sources import order_of, share_by_weight
from llmprune.recipe.calibration import Calibration, TokenWindows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextWindows:
    """Token windows, int64 [N, L].

    ``crossings``: the number of windows that hold parts of several documents; ``documents``: the number of documents
    in the windows of each source. None for ready tokens. ``parts``: the windows of each source of text, as packed.
    ``begin``: the begin-of-text ids that windows and documents begin with; empty where they have none.
    ``lacking``: the ids that the tokenizer puts in front of a text and that some of the ready windows lack.
    ``images``: those that windows refer to; None for text alone.
    """

    windows_NL: Tensor
    crossings: int | None
    begin: tuple[int, ...] = ()
    lacking: tuple[int, ...] = ()
    documents: tuple[int, ...] | None = None
    parts: tuple[Packed, ...] = ()
    images: WindowImages | None = None

    def fingerprint(self) -> str:
        """Return the SHA-256 of shape, token ids and images; also of begin-of-text ids, which a run treats apart."""
        tokens = fingerprint_tokens(self.windows_NL)
        if self.images is not None:
            tokens += self.images.fingerprint()
        apart = self.begin or self.images is not None
        return hashlib.sha256(f"{tokens} {list(self.begin)}".encode()).hexdigest() if apart else tokens


def load_windows(
    windows: TokenWindows,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    default_shape: tuple[int, int],
    processor: Callable[[], ImageProcessor] | None = None,
) -> TextWindows:
    """Read the windows of a recipe's section, without those that the dense model writes itself.

    ``tokenizer``: may be None for ready tokens; ``default_shape``: (N, L) where the recipe gives neither samples nor
    sequence_length; ``processor``: returns that of a model which reads images. Raises CalibrationError where the text
    cannot be read or is too short, and where the recipe asks for a begin-of-text token that the tokenizer lacks.
    """
    begin = required_begin(windows.bos, tokenizer)
    if windows.tokens is not None:
        if isinstance(windows, Calibration) and windows.source_key is not None:
            _require_sources(
                windows, stored=_read_tensor(Path(windows.tokens), windows.source_key, named_by="source_key")
            )
        return _ready(windows, begin)
    import torch

    assert tokenizer is not None, "text needs a tokenizer"
    samples = windows.samples or default_shape[0]
    length = windows.sequence_length or default_shape[1]
    separator = separator_ids(windows, tokenizer, begin=begin)
    sources = windows.text_sources()
    images = processor() if processor is not None and windows.has_images else None
    parts: list[Packed] = []
    found: list[Any] = []
    for source, count in zip(sources, share_by_weight(samples, sources), strict=True):
        packing = Packing(count, length, begin, separator)
        if source.images_field is None or images is None:
            parts.append(pack(source, tokenizer, packing=packing, windows=windows))
        else:
            part = pack_images(source, images, packing=packing, windows=windows)
            parts.append(part.after(len(found)))
            found += part.images
    windows_NL = torch.cat([part.windows_NL for part in parts])[order_of(samples, windows.seed)]
    crossings, documents = sum(part.crossings for part in parts), tuple(part.documents for part in parts)
    return TextWindows(
        windows_NL,
        crossings,
        begin,
        documents=documents,
        parts=tuple(parts),
        images=images.images(found) if images is not None else None,
    )


def fingerprint_tokens(windows_NL: Tensor) -> str:
    """Return the SHA-256 of shape and token ids."""
    head = json.dumps(list(windows_NL.shape)).encode()
    return hashlib.sha256(head + windows_NL.numpy().astype("<i8").tobytes()).hexdigest()


def _ready(windows: TokenWindows, begin: tuple[int, ...]) -> TextWindows:
    """Return the windows of a file as they are, or, with ``bos: true``, all with the begin-of-text ids in front."""
    windows_NL = _ready_windows(windows)
    if not begin:
        return TextWindows(windows_NL, None)
    if windows.bos is True:
        windows_NL = with_begin(windows_NL, begin)
    present = bool((windows_NL == begin[0]).any())
    lacking = () if begins(windows_NL, begin).all() else begin
    return TextWindows(windows_NL, None, begin if present else (), lacking)


def _ready_windows(windows: TokenWindows) -> Tensor:
    import torch

    path, key = Path(str(windows.tokens)), str(windows.key)
    tokens_NL = _read_tensor(path, key)
    integers = not (tokens_NL.is_floating_point() or tokens_NL.is_complex() or tokens_NL.dtype == torch.bool)
    if tokens_NL.ndim != 2 or not integers or not tokens_NL.numel():
        raise CalibrationError(
            f"{key!r} in {path} is {tokens_NL.dtype} {list(tokens_NL.shape)}; "
            "token windows are integers [N, L] with at least one window"
        )
    samples = windows.samples or tokens_NL.shape[0]
    length = windows.sequence_length or tokens_NL.shape[1]
    if samples > tokens_NL.shape[0] or length > tokens_NL.shape[1]:
        raise CalibrationError(
            f"{key!r} in {path} is {list(tokens_NL.shape)}, which is less than the "
            f"{samples} × {length} asked for; lower samples or sequence_length"
        )
    tokens_NL = tokens_NL[:samples, :length].to(torch.int64)
    if tokens_NL.min() < 0:
        raise CalibrationError(
            f"{key!r} in {path} has the negative token id {int(tokens_NL.min())}; "
            "every token of a window is used, so leave no padding in it"
        )
    return tokens_NL


def _require_sources(windows: Calibration, *, stored: Tensor) -> None:
    """Raise CalibrationError where the tensor of sources is no list of whole numbers, one for each stored window."""
    shape, listed = windows.stored_shape(), windows.stored_sources()
    if listed is None or shape is None or len(listed) != shape[0]:
        needed = f"[{shape[0]}]" if shape else "[N]"
        raise CalibrationError(
            f"{windows.source_key!r} in {windows.tokens} is {stored.dtype} {list(stored.shape)}; the sources of the "
            f"windows are integers {needed}, one for each window of {windows.key!r}"
        )


def _read_tensor(path: Path, key: str, *, named_by: str = "key") -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if key in names:
                tensor: Tensor = file.get_tensor(key)
                return tensor
    except (OSError, SafetensorError) as error:
        raise CalibrationError(
            f"the tokens file {path} cannot be read ({error}); give a safetensors file as tokens"
        ) from error
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise CalibrationError(
        f"{path} has no tensor {key!r}{did_you_mean(key, names)}; set {named_by} to one of: {listed or 'none'}"
    )
