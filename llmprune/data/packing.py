"""Pack the documents of one source into token windows.

Shapes in names: N windows, L sequence length.
"""

from __future__ import annotations

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

    def append(self, ids: list[int], tokens: list[int], *, new_text: bool) -> None:
        """Append the tokens of a document and its separator to windows that are laid out one after another.

        ``begin`` goes in front of each window, and of the document where it is a text of its own (``new_text``).
        """
        run, place = tokens + self.separator, 0
        while place < len(run):
            room = self.length - len(ids) % self.length
            if self.begin and room == self.length and place == len(tokens):
                return  # the separator alone would stand between two begin-of-text tokens
            if room == self.length or new_text:
                ids += self.begin[:room]
                room -= len(self.begin[:room])
                new_text = False  # without room for more, the document begins with the next window, which has its own
            ids += run[place : place + room]
            place += room


@dataclass(frozen=True)
class Packed:
    """Windows of one source, int64 [N, L]; how many hold parts of several documents; documents in all of them."""

    windows_NL: Tensor
    crossings: int
    documents: int


def pack(source: TextSource, tokenizer: PreTrainedTokenizerBase, *, packing: Packing, windows: TokenWindows) -> Packed:
    """Return the windows of one source. Raises CalibrationError where its text is too short."""
    import torch

    length, begin = packing.length, list(packing.begin)
    size, separate = packing.samples * length, windows.documents == "separate"
    ids: list[int] = []
    starts: list[int] = []  # of the documents that are used, in ``ids``
    read = 0
    for text in read_documents(source, tokenizer, seed=windows.seed):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        read += bool(tokens)
        begun = bool(begin) and tokens[: len(begin)] == begin  # by a chat template, or in the text
        tokens = tokens[len(begin) :] if begun else tokens
        used = tokens[: len(tokens) // packing.content * packing.content] if separate else tokens
        if used:
            starts.append(len(ids))
            packing.append(ids, used, new_text=begun or windows.documents != "blank_line")
        if len(ids) >= size:
            break
    _require_enough(source, read, tokens=len(ids), shape=(packing.samples, length), separate=separate)
    starts = [start for start in starts if start < size]
    inside = range(1, length - len(begin))  # a document that starts later has no token of its own in the window
    crossed = {start // length for start in starts if start % length in inside}
    windows_NL = torch.tensor(ids[:size], dtype=torch.int64).view(packing.samples, length)
    return Packed(windows_NL, len(crossed), len(starts))


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
