"""Comparison of a tokenizer before and after the cut of its vocabulary, on text.

Raises an error where a text does not decode as before, or is encoded otherwise although all its tokens are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune.common.errors import VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts of other kinds than the sources: scripts, controls, code, spaces, unassigned and combined characters.
OTHER_TEXTS = (
    "The quick brown Fox, 12345.67 + x_9;\n\tdef f(a):  return a\n\n",
    "naïve Straße – 日本語 中文 한국어 العربية עברית हिन्दी ไทย ελληνικά Русский",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 é ﷽ \u200b\u200d\ufeff \x00\x01\x7f \U000e0041 𝔘𝔫𝔦",
    "  leading,   repeated\t\tand trailing spaces   ",
    "",
)


@dataclass(frozen=True)
class Comparison:
    """Lengths of a text in tokens before and after, in bytes, and the lines that encode into the same tokens."""

    bytes: int
    tokens_before: int
    tokens_after: int
    lines: int
    same_lines: int


@dataclass(frozen=True)
class TokenizerPair:
    """A tokenizer before and after the cut. ``new_ids``: new id of each kept token, by its old one."""

    before: PreTrainedTokenizerBase
    after: PreTrainedTokenizerBase
    new_ids: Mapping[int, int]

    def compare(self, texts: Iterable[str]) -> Comparison:
        """Encode every line of the texts with both. Raises VerificationError."""
        lines = [line for text in texts for line in text.splitlines(keepends=True)]
        sizes = [self._compare_line(line) for line in lines]
        return Comparison(
            bytes=sum(len(line.encode("utf-8", "replace")) for line in lines),
            tokens_before=sum(before for before, _, _ in sizes),
            tokens_after=sum(after for _, after, _ in sizes),
            lines=len(lines),
            same_lines=sum(same for _, _, same in sizes),
        )

    def require_special_tokens(self) -> None:
        """Raise VerificationError where a special token has another id than the kept row of its old one."""
        for name, old in self.before.special_tokens_map.items():
            for token in old if isinstance(old, list) else [old]:
                before, after = (one.convert_tokens_to_ids(str(token)) for one in (self.before, self.after))
                if self.new_ids.get(before) != after:
                    raise VerificationError(
                        f"vocabulary: the {name} {token!r} has the id {after} in the new tokenizer, not "
                        f"{self.new_ids.get(before)}; this tokenizer cannot be cut: remove vocabulary"
                    )

    def _compare_line(self, line: str) -> tuple[int, int, bool]:
        before, after = (one(line)["input_ids"] for one in (self.before, self.after))
        expected = [self.new_ids.get(index) for index in before]
        same = expected == after
        if None not in expected and not same:
            raise self._error(line, "is encoded otherwise, although all its tokens are kept")
        if not same and self.before.decode(before) != self.after.decode(after):
            raise self._error(line, "decodes to another text")
        return len(before), len(after), same

    def _error(self, line: str, fault: str) -> VerificationError:
        return VerificationError(
            f"vocabulary: with the new tokenizer, the text {line[:60]!r} {fault}; this tokenizer cannot be cut: "
            "remove vocabulary"
        )
