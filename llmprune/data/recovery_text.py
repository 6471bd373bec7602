"""Text for the training after the cut, as windows that neither scores nor perplexity see, by source.

A source that the calibration or the perplexity reads in the same order is read on where their windows end. From other
text, documents that they hold are left out.

Shapes in names: N windows for training, H held-out windows, L sequence length.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmprune.common.errors import CalibrationError
from llmprune.data.begin_of_text import required_begin
from llmprune.data.packing import Packed, Packing, Position, Unused, pack_rest, separator_ids
from llmprune.data.window_sources import distinct_names, shares
from llmprune.data.windows import TextWindows, load_windows
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.recover import Recover
from llmprune.recipe.text_source import TextSource

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class UsedText:
    """Windows of the run that must not be trained on, and the settings that they were read with."""

    settings: TokenWindows
    text: TextWindows


@dataclass(frozen=True)
class SourceWindows:
    """Windows of one source, int64 [N, L] and [H, L]."""

    name: str
    train_NL: Tensor
    held_out_HL: Tensor


@dataclass(frozen=True)
class RecoverySources:
    """Windows of each source of text, and notes on sources that have too few.

    ``begin``: the begin-of-text ids that windows begin with.
    """

    sources: tuple[SourceWindows, ...]
    begin: tuple[int, ...]
    notes: tuple[str, ...]


def load_recovery_text(
    windows: TokenWindows,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    number: int,
    settings: Recover,
    used: Sequence[UsedText],
) -> RecoverySources:
    """Read ``number`` windows for the training that are in none of the texts ``used``, and held-out windows.

    These are fewer where the text is short. ``windows``: the section with its sequence length, as resolved by the
    calibration. ``tokenizer``: may be None for ready tokens. Raises CalibrationError where no window is left to train
    on, or text cannot be read.
    """
    if windows.tokens is not None:
        ready = _ready(windows, tokenizer, used=used)
        begin, names, wanted = ready.begin, [windows.tokens], [number]
        read = [ready.windows_NL[: number + settings.held_out]]
    else:
        assert tokenizer is not None, "text needs a tokenizer"
        assert windows.sequence_length is not None, "the section is resolved"
        begin = required_begin(windows.bos, tokenizer)
        packing = Packing(0, windows.sequence_length, begin, separator_ids(windows, tokenizer, begin=begin))
        names = distinct_names(windows.text_sources())
        wanted = shares(number, [source.weight for source in windows.text_sources()])
        reader = _Reader(windows, tokenizer, packing, tuple(used))
        read = reader.read_all([count + settings.held_out for count in wanted])
    seen = {row for one in used for row in _rows(one.text.windows_NL)}
    found = {name: _unseen(rows_NL, seen) for name, rows_NL in zip(names, read, strict=True)}
    sources, notes = hold_out(found, settings, wanted=dict(zip(names, wanted, strict=True)))
    if number and not any(len(source.train_NL) for source in sources):
        raise CalibrationError(_nothing_left(sources, used=used, length=read[0].shape[1]))
    return RecoverySources(sources, begin, notes)


def _ready(
    windows: TokenWindows, tokenizer: PreTrainedTokenizerBase | None, *, used: Sequence[UsedText]
) -> TextWindows:
    """Return the ready windows of a file that follow those which the run uses elsewhere."""
    text = load_windows(windows, tokenizer, default_shape=(0, 0))
    place = windows.tokens, windows.key
    first = max(
        (len(one.text.windows_NL) for one in used if (one.settings.tokens, one.settings.key) == place), default=0
    )
    return replace(text, windows_NL=text.windows_NL[first:])


def hold_out(
    found: Mapping[str, Tensor], settings: Recover, *, wanted: Mapping[str, int]
) -> tuple[tuple[SourceWindows, ...], tuple[str, ...]]:
    """Return the windows of each source, the first of them held out, and notes on sources that have too few.

    ``wanted``: windows of each source for the training, of which a source may have fewer.
    """
    sources, notes = [], []
    for name, rows_NL in found.items():
        enough = name in wanted and len(rows_NL) >= wanted[name] + settings.held_out
        held = settings.held_out if enough else settings.held_out_of(len(rows_NL))
        if not held:
            notes.append(f"{name} has no window that calibration and perplexity did not see, so recover leaves it out")
            continue
        if held < settings.held_out:
            notes.append(f"{name} has {len(rows_NL)} windows for recover, of which {held} are held out")
        elif enough and not wanted[name]:
            notes.append(f"{name} is not trained on: its share of the windows for recover is below one")
        sources.append(SourceWindows(name, rows_NL[held:], rows_NL[:held]))
    return tuple(sources), tuple(notes)


def _unseen(rows_NL: Tensor, seen: Collection[bytes]) -> Tensor:
    """Return the windows that are not among those ``seen``."""
    return rows_NL[[index for index, row in enumerate(_rows(rows_NL)) if row not in seen]]


def _rows(windows_NL: Tensor) -> list[bytes]:
    """Return the content of each window."""
    return [row.tobytes() for row in windows_NL.numpy()]


def _nothing_left(sources: Sequence[SourceWindows], *, used: Sequence[UsedText], length: int) -> str:
    left = sum(len(source.held_out_HL) for source in sources)
    tokens = sum(one.text.windows_NL.numel() for one in used)
    return (
        f"recover.data: no data is left that calibration and perplexity did not see: they hold {tokens:,} tokens, and "
        f"{left} further windows of {length} tokens ({left * length:,} tokens), which are held out, are all there is; "
        "name more text in recover.data, take fewer calibration.samples, or shorten recover.data.sequence_length"
    )


@dataclass(frozen=True)
class _Reader:
    """Reads windows of sources of text. ``packing``: of windows, their number left open."""

    windows: TokenWindows
    tokenizer: PreTrainedTokenizerBase
    packing: Packing
    used: tuple[UsedText, ...]

    def read_all(self, wanted: Sequence[int]) -> list[Tensor]:
        """Return the wanted windows of each source, int64 [N, L]; where one has too few, the others give more."""
        import torch

        sources = self.windows.text_sources()
        parts = [self._unused(source) for source in sources]
        found: list[list[Tensor]] = [[] for _ in sources]
        asked = dict(enumerate(wanted))
        while asked:
            missing, whole = 0, []
            for index, count in asked.items():
                packed = self._read(sources[index], count, part=parts[index])
                found[index].append(packed.windows_NL)
                parts[index] = replace(parts[index], start=packed.end)
                missing += count - len(packed.windows_NL)
                whole += [index] * (count == len(packed.windows_NL))
            more = shares(missing, [sources[index].weight for index in whole]) if whole else []
            asked = {index: count for index, count in zip(whole, more, strict=True) if count}
        return [torch.cat(of_source) for of_source in found]

    def _read(self, source: TextSource, samples: int, *, part: Unused) -> Packed:
        packing = replace(self.packing, samples=samples)
        return pack_rest(source, self.tokenizer, packing=packing, windows=self.windows, part=part)

    def _unused(self, source: TextSource) -> Unused:
        """Return the part of a source that no other text of the run holds."""
        start, without = Position(), set[bytes]()
        for one in self.used:
            for other, packed in zip(one.settings.text_sources(), one.text.parts, strict=True):
                if _same_rows(other, source) and one.settings.seed == self.windows.seed:
                    start = max(start, packed.end)
                else:
                    without |= packed.digests
        return Unused(start, frozenset(without))


def _same_rows(one: TextSource, other: TextSource) -> bool:
    """Check that two sources have the same documents, in the same order by the same seed."""
    about = {"weight", "name", "licence"}
    return one.model_dump(exclude=about) == other.model_dump(exclude=about)
