"""Pack the documents of one source into token windows.

Shapes in names: N windows, L sequence length.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune.common.errors import CalibrationError
from llmprune.data.sources import read_documents
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.text_source import TextSource

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Packing:
    """Layout of the windows of one source: ``begin`` and ``separator`` are token ids, empty for none."""

    samples: int
    length: int
    begin: tuple[int, ...]
    separator: list[int]

    @property
    def content(self) -> int:
        """Number of a window's tokens that follow the begin-of-text ids."""
        return self.length - len(self.begin)

    def append(self, ids: list[int], run: Run) -> int:
        """Append the tokens of a document and its separator to windows that are laid out one after another.

        ``begin`` goes in front of each window, and of the document where it is a text of its own. Return the number of
        the run's tokens that are used when the last window is full; all of them where it is not.
        """
        tokens, new_text, place = run.tokens, run.new_text, 0
        while place < len(tokens) and len(ids) < self.samples * self.length:
            room = self.length - len(ids) % self.length
            if self.begin and room == self.length and place == run.text:
                return len(tokens)  # the separator alone would stand between two begin-of-text tokens
            if room == self.length or new_text:
                ids += self.begin[:room]
                room -= len(self.begin[:room])
                new_text = False  # without room for more, the document begins with the next window, which has its own
            ids += tokens[place : place + room]
            place += room
        return min(place, len(tokens))


@dataclass(frozen=True)
class Run:
    """Tokens of a document and its separator, which begins at ``text``. ``new_text``: the document begins a text.

    ``text`` is below zero where a part of the separator was used before.
    """

    tokens: list[int]
    text: int
    new_text: bool

    def after(self, used: int) -> Run:
        """Return the rest after the first ``used`` tokens."""
        return Run(self.tokens[used:], self.text - used, self.new_text and not used)

    def cut(self, length: int) -> Run:
        """Return the document without what exceeds a multiple of ``length`` tokens, and without its separator."""
        text = max(self.text, 0) // length * length
        return Run(self.tokens[:text], text, self.new_text)


@dataclass(frozen=True, order=True)
class Position:
    """Place in the shuffled documents of a source: ``documents`` are used up, and ``tokens`` of the one that follows.

    These count its separator, and not the begin-of-text ids.
    """

    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Unused:
    """Part of a source to pack: what follows ``start``, but for the documents with a digest in ``without``."""

    start: Position = Position()
    without: frozenset[bytes] = frozenset()


@dataclass(frozen=True)
class Packed:
    """Windows of one source, int64 [N, L]; how many hold parts of several documents; documents in all of them.

    ``end``: the place in the source behind the last window. ``digests``: of the texts that the windows hold, whole or
    in part.
    """

    windows_NL: Tensor
    crossings: int
    documents: int
    end: Position
    digests: frozenset[bytes]


def pack(source: TextSource, tokenizer: PreTrainedTokenizerBase, *, packing: Packing, windows: TokenWindows) -> Packed:
    """Return the windows of one source. Raises CalibrationError where its text is too short."""
    filled = _fill(source, tokenizer, packing=packing, windows=windows, part=Unused())
    separate = windows.documents == "separate"
    _require_enough(
        source, filled.read, tokens=len(filled.ids), shape=(packing.samples, packing.length), separate=separate
    )
    return filled.packed(packing)


def pack_rest(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    packing: Packing,
    windows: TokenWindows,
    part: Unused,
) -> Packed:
    """Return the windows of a part of one source: ``packing.samples`` of them, or as many as there are."""
    return _fill(source, tokenizer, packing=packing, windows=windows, part=part).packed(packing)


@dataclass(frozen=True)
class _Filled:
    """Ids of windows laid out one after another, and the number of documents with text that were read.

    ``starts``: where each document that is used starts in ``ids``; ``digests``: of their texts.
    """

    ids: list[int]
    starts: list[int]
    digests: list[bytes]
    read: int
    end: Position

    def packed(self, packing: Packing) -> Packed:
        import torch

        length, samples = packing.length, min(len(self.ids) // packing.length, packing.samples)
        size = samples * length
        starts = [start for start in self.starts if start < size]
        inside = range(1, length - len(packing.begin))  # one that starts later has no token of its own in the window
        crossed = {start // length for start in starts if start % length in inside}
        windows_NL = torch.tensor(self.ids[:size], dtype=torch.int64).view(samples, length)
        return Packed(windows_NL, len(crossed), len(starts), self.end, frozenset(self.digests[: len(starts)]))


def _fill(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    packing: Packing,
    windows: TokenWindows,
    part: Unused,
) -> _Filled:
    """Lay out a source's documents until the windows are full or the text ends."""
    ids: list[int] = []
    starts: list[int] = []
    digests: list[bytes] = []
    start, read, size = part.start, 0, packing.samples * packing.length
    end = Position()
    for index, text in enumerate(read_documents(source, tokenizer, seed=windows.seed)):
        if index < start.documents or (part.without and digest_of(text) in part.without):
            continue
        run = _run_of(text, tokenizer, packing=packing, windows=windows)
        read += run.text > 0
        used = start.tokens if index == start.documents else 0
        run = run.after(used)
        if windows.documents == "separate":
            run = run.cut(packing.content)
        if run.text > 0:
            starts.append(len(ids))
            digests.append(digest_of(text))
        if run.text > 0 or used:
            used += packing.append(ids, run)
        if len(ids) >= size:
            return _Filled(ids, starts, digests, read, Position(index, used))
        end = Position(index + 1)
    return _Filled(ids, starts, digests, read, end)


def _run_of(text: str, tokenizer: PreTrainedTokenizerBase, *, packing: Packing, windows: TokenWindows) -> Run:
    """Return a document as token ids with its separator, without the begin-of-text ids that it may begin with."""
    begin = list(packing.begin)
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begun = bool(begin) and tokens[: len(begin)] == begin  # by a chat template, or in the text
    tokens = tokens[len(begin) :] if begun else tokens
    return Run(tokens + packing.separator, len(tokens), begun or windows.documents != "blank_line")


def digest_of(text: str) -> bytes:
    """Return the digest by which a text is recognised."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def separator_ids(windows: TokenWindows, tokenizer: PreTrainedTokenizerBase, *, begin: tuple[int, ...]) -> list[int]:
    """Return the token ids between two documents; none where ``begin`` is the end-of-text token itself, as of OPT."""
    if windows.documents == "separate":
        return []
    if windows.documents == "blank_line":
        ids: list[int] = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        return ids
    end = tokenizer.eos_token_id
    return [] if end is None or begin == (end,) else [end]


def _require_enough(source: TextSource, documents: int, *, tokens: int, shape: tuple[int, int], separate: bool) -> None:
    samples, length = shape
    if not documents:
        raise CalibrationError(
            f"{source.dataset} ({source.split}) has no text: all its rows are blank; give a source with text"
        )
    if tokens < samples * length:
        fit = tokens // length
        fewer = f"ask for at most {fit} samples, shorten" if fit else "shorten"
        whole = " in windows of one document each" if separate else ""
        join = ", join documents" if separate else ""
        raise CalibrationError(
            f"{source.dataset} ({source.split}) has {tokens:,} tokens{whole} in {documents:,} documents; "
            f"{samples} samples of {length} need {samples * length:,}: {fewer} sequence_length{join}, or add text"
        )
