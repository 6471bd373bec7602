"""Outline of a report page: its headings, ids and labels."""

from __future__ import annotations

from html.parser import HTMLParser


class PageOutline(HTMLParser):
    """Parser of a page that checks balanced tags, and collects headings and ids."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link", "wbr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.named_by: list[str] = []
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Ignore tags that close themselves."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the tag, its id and its labels."""
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        self.named_by += (values.get("aria-labelledby") or "").split()

    def handle_endtag(self, tag: str) -> None:
        """Check that the tag that was opened last is closed."""
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        """Record the text of section headings."""
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
