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
from llmprune.recipe.text_source import TextSource

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MOST_EPOCHS = 4  # that are worth about as much as new text
_MOST_HELD_OUT = 4  # of a source with little text, one window in so many is held out


@dataclass(frozen=True)
class UsedText:
    """Windows of the run that must not be trained on, and the settings that they were read with."""

    settings: TokenWindows
    text: TextWindows


@dataclass(frozen=True)
class Amounts:
    """Windows to read: ``training`` of all sources together, ``held_out`` of each."""

    training: int
    held_out: int


@dataclass(frozen=True)
class SourceWindows:
    """Windows of one source, int64 [N, L] and [H, L]."""

    name: str
    train_NL: Tensor
    held_out_HL: Tensor


@dataclass(frozen=True)
class RecoveryText:
    """Windows of each source of text. ``begin``: the begin-of-text ids that they begin with."""

    sources: tuple[SourceWindows, ...]
    begin: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RecoveryWindows:
    """Windows of the training in shuffled order, each once, and held-out windows, with their sources.

    ``order_M``: index in ``train_NL`` of each window that the training takes, one after another; the first N are all
    of them, later ones repeat them. ``names``: of the sources that the indices count.
    """

    train_NL: Tensor
    train_sources_N: Tensor
    order_M: Tensor
    held_out_NL: Tensor
    held_out_sources_N: Tensor
    names: tuple[str, ...]
    begin: tuple[int, ...]
    notes: tuple[str, ...]


def load_recovery_text(
    windows: TokenWindows, tokenizer: PreTrainedTokenizerBase | None, *, amounts: Amounts, used: Sequence[UsedText]
) -> RecoveryText:
    """Read windows for the training that are in none of the texts ``used``; fewer than asked for where text is short.

    ``windows``: the section with its sequence length, as resolved by the calibration. ``tokenizer``: may be None for
    ready tokens. Raises CalibrationError where no window is left to train on, or text cannot be read.
    """
    if windows.tokens is not None:
        ready = _ready(windows, tokenizer, used=used)
        begin, taken = ready.begin, {windows.tokens: ready.windows_NL[: amounts.training + amounts.held_out]}
    else:
        assert tokenizer is not None, "text needs a tokenizer"
        assert windows.sequence_length is not None, "the section is resolved"
        begin = required_begin(windows.bos, tokenizer)
        packing = Packing(0, windows.sequence_length, begin, separator_ids(windows, tokenizer, begin=begin))
        reader = _Reader(windows, tokenizer, packing, tuple(used))
        taken = dict(zip(distinct_names(windows.text_sources()), reader.read_all(amounts), strict=True))
    seen = {row for one in used for row in _rows(one.text.windows_NL)}
    sources, notes = _divided({name: _unseen(rows_NL, seen) for name, rows_NL in taken.items()}, amounts.held_out)
    if not any(len(source.train_NL) for source in sources):
        raise CalibrationError(_nothing_left(sources, used=used, length=next(iter(taken.values())).shape[1]))
    return RecoveryText(sources, begin, notes)


def arrange(text: RecoveryText, generated_NL: Tensor | None, *, amounts: Amounts, seed: int) -> RecoveryWindows:
    """Return the windows of a training on text and on windows that the dense model wrote, in their order.

    ``generated_NL``: int64 [G, L], of which ``amounts.held_out``, at most a quarter, are held out.
    """
    import torch

    sources, notes = list(text.sources), list(text.notes)
    if generated_NL is not None and len(generated_NL):
        own, told = _divided({SELF_GENERATED: generated_NL}, amounts.held_out)
        sources += own
        notes += told
    indices = range(len(sources))
    pool_NL = torch.cat([source.train_NL for source in sources])
    pool_N = torch.cat([torch.full((len(sources[index].train_NL),), index) for index in indices])
    shuffled_N = order_of(len(pool_NL), seed)[: amounts.training]
    held_out_NL = torch.cat([source.held_out_HL for source in sources])
    held_out_N = torch.cat([torch.full((len(sources[index].held_out_HL),), index) for index in indices])
    epochs = amounts.training / len(shuffled_N)
    if epochs > 1:
        notes.append(_about_epochs(epochs, number=len(shuffled_N), tokens=shuffled_N.numel() * pool_NL.shape[1]))
    return RecoveryWindows(
        pool_NL[shuffled_N],
        pool_N[shuffled_N],
        _order(len(shuffled_N), amounts.training, seed=seed),
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


def _about_epochs(epochs: float, *, number: int, tokens: int) -> str:
    note = f"the text for recover has {number} windows ({tokens:,} tokens), which are repeated {epochs:.1f} times"
    if epochs <= MOST_EPOCHS:
        return note
    return f"{note}; more than {MOST_EPOCHS} epochs add little: add text to recover.data, or train on fewer tokens"


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


def _divided(found: Mapping[str, Tensor], held_out: int) -> tuple[tuple[SourceWindows, ...], tuple[str, ...]]:
    """Return the windows of each source, the first of them held out, and notes on sources that have too few."""
    sources, notes = [], []
    for name, rows_NL in found.items():
        held = min(held_out, ceil(len(rows_NL) / _MOST_HELD_OUT))
        if not held:
            notes.append(f"recover.data: {name} has no window that calibration and perplexity did not see; left out")
            continue
        if held < held_out:
            notes.append(f"recover.data: {name} has {len(rows_NL)} windows, of which {held} are held out")
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

    def read_all(self, amounts: Amounts) -> list[Tensor]:
        """Return the windows of each source, int64 [N, L]; where one has too few, the others give more."""
        import torch

        sources = self.windows.text_sources()
        weights = [source.weight for source in sources]
        wanted = shares(amounts.training, weights)
        parts = [self._unused(source) for source in sources]
        found: list[list[Tensor]] = [[] for _ in sources]
        open_ = list(range(len(sources)))
        asked = {index: wanted[index] + amounts.held_out for index in open_}
        while open_:
            for index in open_:
                packed = self._read(sources[index], asked[index], part=parts[index])
                found[index].append(packed.windows_NL)
                parts[index] = Unused(packed.end, parts[index].without)
            short = {index for index in open_ if len(found[index][-1]) < asked[index]}
            missing = sum(asked[index] - len(found[index][-1]) for index in short)
            open_ = [index for index in open_ if index not in short]
            if not missing or not open_:
                break
            more = shares(missing, [weights[index] for index in open_])
            asked = {index: count for index, count in zip(open_, more, strict=True) if count}
            open_ = list(asked)
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
