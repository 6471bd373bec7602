"""The terminal that tables and progress bars are printed to."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from llmprune.common.printing import printable


class PlainConsole(Console):
    """A console whose text is text: square brackets are no markup, and control characters become escapes.

    Colours and the movements of a progress bar are rich's own, and pass.
    """

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render to segments, each with printable text."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text, newlines=True)
            yield segment if text == segment.text else Segment(text, segment.style)
