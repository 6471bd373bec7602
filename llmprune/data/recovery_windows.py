"""Windows for the training after the cut: text that neither scores nor perplexity see, and held-out windows of it.

A source that the calibration or the perplexity reads in the same order is read on where their windows end. From other
text, documents that they hold are left out. Where all text is used up, the training repeats it: a few epochs cost
little against new text, more than four are worth less and less (arXiv 2305.16264).

Shapes in names: N windows for training, H held-out windows, M windows in the order of the training, L sequence length.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from llmprune.common.errors import CalibrationError
from llmprune.data.begin_of_text import required_begin
from llmprune.data.packing import Packed, Packing, Position, Unused, pack_rest, separator_ids
from llmprune.data.window_sources import SELF_GENERATED, distinct_names, order_of, shares
from llmprune.data.windows import TextWindows, load_windows
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.recover import Recover
from llmprune.recipe.text_source import TextSource

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MOST_EPOCHS = 4  # that are worth about as much as new text


@dataclass(frozen=True)
class Part:
    """One of several trainings that follow each other on the same text; ``number`` counts from 1."""

    number: int = 1
    of: int = 1


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


@dataclass(frozen=True)
class RecoveryWindows:
    """Windows of the training in shuffled order, each once, and held-out windows, with their sources.

    ``order_M``: index in ``train_NL`` of each window that the training takes, one after another; a window comes again
    once all others have been taken. ``names``: of the sources that the indices count.
    """

    train_NL: Tensor
    train_sources_N: Tensor
    order_M: Tensor
    held_out_NL: Tensor
    held_out_sources_N: Tensor
    names: tuple[str, ...]
    begin: tuple[int, ...]
    notes: tuple[str, ...]

    def part(self, part: Part) -> RecoveryWindows:
        """Return the windows of one of several trainings that follow each other; all have the same held-out windows."""
        import torch

        if part.of == 1:
            return self
        places = len(self.order_M) // part.of
        own_M = self.order_M[(part.number - 1) * places : part.number * places]
        used_N = torch.tensor(sorted(set(own_M.tolist())))
        return replace(
            self,
            train_NL=self.train_NL[used_N],
            train_sources_N=self.train_sources_N[used_N],
            order_M=torch.searchsorted(used_N, own_M),
        )


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
    sources, notes = _divided(found, settings, wanted=dict(zip(names, wanted, strict=True)))
    if number and not any(len(source.train_NL) for source in sources):
        raise CalibrationError(_nothing_left(sources, used=used, length=read[0].shape[1]))
    return RecoverySources(sources, begin, notes)


def arrange(
    text: RecoverySources, generated_NL: Tensor | None, *, number: int, settings: Recover, seed: int
) -> RecoveryWindows:
    """Return ``number`` windows of a training on text and on windows that the dense model wrote, in their order.

    ``generated_NL``: int64 [G, L], of which as many are held out as of another source.
    """
    import torch

    sources, notes = list(text.sources), list(text.notes)
    if generated_NL is not None and len(generated_NL):
        own, told = _divided({SELF_GENERATED: generated_NL}, settings, wanted={})
        sources += own
        notes += told
    indices = range(len(sources))
    pool_NL = torch.cat([source.train_NL for source in sources])
    pool_N = torch.cat([torch.full((len(sources[index].train_NL),), index) for index in indices])
    shuffled_N = order_of(len(pool_NL), seed)[:number]
    held_out_NL = torch.cat([source.held_out_HL for source in sources])
    held_out_N = torch.cat([torch.full((len(sources[index].held_out_HL),), index) for index in indices])
    notes += about_epochs(number, available=len(pool_NL), length=pool_NL.shape[1])
    return RecoveryWindows(
        pool_NL[shuffled_N],
        pool_N[shuffled_N],
        _order(len(shuffled_N), number, seed=seed),
        held_out_NL,
        held_out_N,
        tuple(source.name for source in sources),
        text.begin,
        tuple(notes),
    )


def _order(windows: int, places: int, *, seed: int) -> Tensor:
    """Return the window of each place of the training, int64 [places]; each epoch in an order of its own."""
    import torch

    epochs = [torch.arange(windows)]
    epochs += [order_of(windows, (seed + epoch) % 2**32) for epoch in range(1, ceil(places / windows))]
    return torch.cat(epochs)[:places]


def about_epochs(number: int, *, available: int, length: int) -> list[str]:
    """Return a note where a training takes more windows than there are, so that they are repeated."""
    if number <= available:
        return []
    note = (
        f"recover: the text has {available} windows ({available * length:,} tokens) to train on, and each is taken "
        f"{number / available:.1f} times"
    )
    if number <= MOST_EPOCHS * available:
        return [note]
    return [f"{note}; more than {MOST_EPOCHS} times adds little: add text to recover.data, or lower recover.tokens"]


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


def _divided(
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
