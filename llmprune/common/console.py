"""Console for tables and progress bars."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from llmprune.common.printing import printable


class PlainConsole(Console):
    """A console that prints text verbatim: no markup, and control characters become visible escapes.

    Control codes of rich itself, such as colours and cursor movements of progress bars, are kept.
    """

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments with printable text."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text, newlines=True)
            yield segment if text == segment.text else Segment(text, segment.style)
