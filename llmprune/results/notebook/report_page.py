"""A report page as a value that a notebook shows inline."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from llmprune.common.errors import OutputError

_HEIGHT = "36em"


@dataclass(frozen=True)
class ReportPage:
    """The page of a run. A notebook shows it in a frame that runs no script and reaches nothing of the notebook."""

    html: str
    title: str = "Report"

    @classmethod
    def load(cls, folder: str | Path) -> ReportPage:
        """Read the page of a run folder. Raises OutputError."""
        path = Path(folder)
        path = path / "report.html" if path.is_dir() else path
        try:
            return cls(path.read_text(encoding="utf-8"), f"Report of {path.parent.name}")
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"{path} cannot be read: {error}; give the folder of a finished run") from error

    def __repr__(self) -> str:
        return f"<{self.title}: {len(self.html):,} characters of HTML; .save(FILE) writes it>"

    def _repr_html_(self) -> str:
        style = f"width:100%;height:{_HEIGHT};border:1px solid rgba(128,128,128,.4);background:#fff"
        return (
            f'<iframe sandbox="" title="{escape(self.title)}" style="{style}" srcdoc="{escape(self.html)}">'
            "This notebook shows no frames.</iframe>"
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file. Raises DiskError."""
        from llmprune.common.files import write_text

        write_text(Path(path), self.html)
        return Path(path)
