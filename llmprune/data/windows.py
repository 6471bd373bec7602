"""Pack text into token windows, reproducibly, and fingerprint them.

Documents are shuffled with the seed, tokenised without special tokens, joined and cut into windows of L tokens that do
not overlap. A window may hold parts of several documents, which then attend to each other: such windows are counted,
and ``documents: separate`` avoids them. Text that gives fewer windows than were asked for is an error; no document is
repeated.

Shapes in names: N windows, L sequence length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.common.errors import CalibrationError, did_you_mean
from llmprune.data.sources import read_documents
from llmprune.recipe.calibration import Calibration, TokenWindows
from llmprune.recipe.text_source import TextSource

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


SELF_GENERATED = "self_generated"  # name of the source of windows that the dense model wrote itself


@dataclass(frozen=True)
class TextWindows:
    """Token windows, int64 [N, L].

    ``crossings``: the number of windows that hold parts of several documents; ``documents``: the number of documents
    in the windows of each source. None for ready tokens.
    """

    windows_NL: Tensor
    crossings: int | None
    documents: tuple[int, ...] | None = None


def load_windows(
    windows: TokenWindows, tokenizer: PreTrainedTokenizerBase | None, *, default_shape: tuple[int, int]
) -> TextWindows:
    """Read the windows of a recipe's section, without those that the dense model writes itself.

    ``tokenizer``: may be None for ready tokens; ``default_shape``: (N, L) where the recipe gives neither samples nor
    sequence_length. Raises CalibrationError where the text cannot be read or is too short.
    """
    if windows.tokens is not None:
        windows_NL = _ready_windows(windows)
        if isinstance(windows, Calibration) and windows.source_key is not None:
            _require_sources(
                windows, stored=_read_tensor(Path(windows.tokens), windows.source_key, named_by="source_key")
            )
        return TextWindows(windows_NL, None)
    import torch

    assert tokenizer is not None, "text needs a tokenizer"
    samples = windows.text_samples(default_shape[0])
    length = windows.sequence_length or default_shape[1]
    sources = windows.text_sources()
    parts = [
        _pack(source, tokenizer, shape=(count, length), windows=windows)
        for source, count in zip(sources, _share(samples, sources), strict=True)
    ]
    windows_NL = torch.cat([part.windows_NL for part in parts])[_order(samples, windows.seed)]
    return TextWindows(windows_NL, sum(part.crossings for part in parts), tuple(part.documents for part in parts))


def sources_of_windows(windows: Calibration, default_shape: tuple[int, int]) -> Tensor | None:
    """Return the index in ``source_names`` of the source of each calibration window, int64 [N].

    The windows are those of ``load_windows`` and ``with_generated``. None where they have no known sources: for ready
    tokens without a readable ``source_key``.
    """
    import torch

    sources, stored = windows.text_sources(), windows.stored_sources()
    samples = windows.text_samples(default_shape[0])
    if sources:
        counts = torch.tensor(_share(samples, sources))
        read_N = torch.arange(len(sources)).repeat_interleave(counts)[_order(samples, windows.seed)]
    elif stored is not None:
        read_N = torch.unique(torch.tensor(stored[:samples]), return_inverse=True)[1]
    elif windows.self_generated:
        read_N = torch.zeros(samples, dtype=torch.int64)
    else:
        return None
    own_N = torch.full((windows.self_generated,), int(read_N.max()) + 1)
    return with_generated(read_N, own_N, seed=windows.seed)


def source_names(windows: Calibration, default_shape: tuple[int, int]) -> tuple[str, ...]:
    """Return the names of the sources: of text as the recipe names it, of ready tokens their numbers, such as 0, 1."""
    stored = windows.stored_sources()
    numbers = sorted(set((stored or [])[: windows.text_samples(default_shape[0])]))
    names = [source.name or source.dataset for source in windows.text_sources()] or [str(number) for number in numbers]
    names = names or [str(windows.tokens)]
    return (*names, SELF_GENERATED) if windows.self_generated else tuple(names)


def with_generated(read_N: Tensor, generated_N: Tensor, *, seed: int) -> Tensor:
    """Return what was read and what the model generated in one shuffled order; unchanged where it generated nothing.

    Both are windows [N, L], or another value for each window [N].
    """
    import torch

    if not len(generated_N):
        return read_N
    return torch.cat([read_N, generated_N])[_order(len(read_N) + len(generated_N), seed)]


def _order(samples: int, seed: int) -> Tensor:
    import torch

    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))


def fingerprint_tokens(windows_NL: Tensor) -> str:
    """Return the SHA-256 of shape and token ids."""
    head = json.dumps(list(windows_NL.shape)).encode()
    return hashlib.sha256(head + windows_NL.numpy().astype("<i8").tobytes()).hexdigest()


def require_shares(windows: TokenWindows, samples: int) -> None:
    """Raise CalibrationError where a source would get none of ``samples`` windows in all."""
    if windows.text_sources():
        _share(windows.text_samples(samples), windows.text_sources())


def _share(samples: int, sources: Sequence[TextSource]) -> list[int]:
    """Split a number of windows by weight, the largest remainders rounded up."""
    total = sum(source.weight for source in sources)
    exact = [samples * source.weight / total for source in sources]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: samples - sum(counts)]:
        counts[index] += 1
    left_out = [source.name or source.dataset for source, count in zip(sources, counts, strict=True) if not count]
    if left_out:
        needed = ceil(total / min(source.weight for source in sources))
        raise CalibrationError(
            f"{', '.join(left_out)} would get none of the {samples} samples; "
            f"ask for more samples ({needed} give each source one), raise its weight, or remove it from sources"
        )
    return counts


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
    samples = tokens_NL.shape[0] if windows.samples is None else windows.text_samples(windows.samples)
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


@dataclass(frozen=True)
class _Packed:
    """Windows of one source [samples, L]; how many hold parts of several documents; documents in all of them."""

    windows_NL: Tensor
    crossings: int
    documents: int


def _pack(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, *, shape: tuple[int, int], windows: TokenWindows
) -> _Packed:
    """Return windows of one source, int64 [samples, L]. Raises CalibrationError where its text is too short."""
    import torch

    samples, length = shape
    separate, separator = windows.documents == "separate", _separator(windows, tokenizer)
    ids: list[int] = []
    starts: list[int] = []  # of the documents that are used, in ``ids``
    read = 0
    for text in read_documents(source, tokenizer, seed=windows.seed):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        read += bool(tokens)
        used = tokens[: len(tokens) // length * length] if separate else tokens
        if used:
            starts.append(len(ids))
            ids += used + separator
        if len(ids) >= samples * length:
            break
    _require_enough(source, read, tokens=len(ids), shape=shape, separate=separate)
    starts = [start for start in starts if start < samples * length]
    crossed = {start // length for start in starts if start % length}
    windows_NL = torch.tensor(ids[: samples * length], dtype=torch.int64).view(samples, length)
    return _Packed(windows_NL, len(crossed), len(starts))


def _separator(windows: TokenWindows, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids between two documents."""
    if windows.documents == "separate":
        return []
    if windows.documents == "blank_line":
        ids: list[int] = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        return ids
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _require_enough(source: TextSource, documents: int, *, tokens: int, shape: tuple[int, int], separate: bool) -> None:
    samples, length = shape
    if not documents:
        raise CalibrationError(f"{source.dataset} ({source.split}) has no text at all; give a source with text")
    if tokens < samples * length:
        fit = tokens // length
        fewer = f"ask for at most {fit} samples, shorten" if fit else "shorten"
        whole = " in windows of one document each" if separate else ""
        join = ", join documents" if separate else ""
        raise CalibrationError(
            f"{source.dataset} ({source.split}) has {tokens:,} tokens{whole} in {documents:,} documents; "
            f"{samples} samples of {length} need {samples * length:,}: {fewer} sequence_length{join}, or add text"
        )
