"""Progress in the output of a notebook's cell: a bar of ipywidgets, or HTML that is replaced where that is missing.

Its end is plain HTML in both cases, so that a saved notebook shows it without a kernel.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from llmprune.common.printing import printable
from llmprune.common.progress import Reported, listening
from llmprune.common.time_left import rough_duration

_COLOURS = {"info": "#2563eb", "success": "#15803d", "danger": "#b91c1c", "warning": "#b45309"}


def in_notebook() -> bool:
    """Check whether this process is the kernel of a notebook, which can show HTML."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return getattr(shell, "kernel", None) is not None


class NotebookProgress:
    """One bar with a title and a line of text. ``show`` changes it, ``end`` shows its last state for good."""

    def __init__(self, title: str) -> None:
        from IPython.display import display

        self._title = printable(title)
        self._widgets = _widgets(self._title)
        shown = self._widgets.box if self._widgets else _html(self._page("", None, style="info"))
        self._display: Any = display(shown, display_id=True)  # type: ignore[no-untyped-call]

    def show(self, text: str, fraction: float | None) -> None:
        """Show how it stands. ``fraction``: of the whole that is done; None: unknown."""
        if self._widgets:
            self._widgets.show(printable(text), fraction)
        else:
            self._display.update(_html(self._page(text, fraction, style="info")))

    def end(self, text: str, *, style: str, fraction: float | None = 1.0) -> None:
        """Show the last state in place of the bar. ``style``: success, warning or danger."""
        if self._widgets:
            self._widgets.box.close()
        self._display.update(_html(self._page(text, fraction, style=style)))

    def _page(self, text: str, fraction: float | None, *, style: str) -> str:
        return bar_html(self._title, text, fraction=fraction, style=style)


def bar_html(title: str, text: str, *, fraction: float | None, style: str) -> str:
    """Return a bar as HTML without script. ``style``: info, success, warning or danger."""
    share = "" if fraction is None else f"width:{100 * min(max(fraction, 0.0), 1.0):.1f}%;"
    percent = "" if fraction is None else f" {fraction:.0%}"
    colour = _COLOURS[style]
    box = f"max-width:46em;font-family:system-ui,sans-serif;border-left:.25em solid {colour};padding-left:.6em"
    track = "height:.5em;border-radius:.25em;background:rgba(128,128,128,.25);overflow:hidden;margin:.3em 0"
    filled = f"height:100%;{share or 'width:0;'}background:{colour}"
    return (
        f'<div style="{box}"><div><strong>{escape(printable(title))}</strong>{percent}</div>'
        f'<div style="{track}" role="presentation"><div style="{filled}"></div></div>'
        f"<div>{escape(printable(text))}</div></div>"
    )


@contextmanager
def progress_in_notebook(title: str) -> Iterator[None]:
    """Show the progress of a run of this process in the cell's output; outside of a notebook, show nothing."""
    if not in_notebook():
        yield
        return
    view, began = NotebookProgress(title), time.monotonic()
    try:
        with listening(lambda reported: view.show(_sentence(reported), _fraction(reported))):
            yield
    except KeyboardInterrupt:
        view.end("interrupted; run the same recipe again to continue", style="warning", fraction=None)
        raise
    except BaseException as error:
        view.end(str(error).partition("\n")[0] or type(error).__name__, style="danger", fraction=None)
        raise
    view.end(f"done in {rough_duration(time.monotonic() - began)}", style="success")


class _Widgets:
    """The bar as widgets."""

    def __init__(self, ipywidgets: Any, title: str) -> None:
        self._bar = ipywidgets.FloatProgress(min=0.0, max=1.0, layout={"width": "min(46em, 100%)"})
        self._label, self._text = ipywidgets.Label(title, style={"font_weight": "bold"}), ipywidgets.Label("")
        self.box = ipywidgets.VBox([self._label, self._bar, self._text])

    def show(self, text: str, fraction: float | None) -> None:
        self._bar.value = fraction or 0.0
        self._text.value = text if fraction is None else f"{fraction:.0%}  {text}"


def _widgets(title: str) -> _Widgets | None:
    try:
        import ipywidgets
    except ImportError:
        return None
    return _Widgets(ipywidgets, title)


def _html(text: str) -> Any:
    from IPython.display import HTML

    return HTML(text)  # type: ignore[no-untyped-call]


def _sentence(reported: Reported) -> str:
    parts = [reported.step]
    if reported.total and reported.done is not None:
        parts.append(f"{min(reported.done + 1, reported.total)} of {reported.total}")
    if reported.detail:
        parts.append(reported.detail)
    if reported.run_seconds_left:
        parts.append(f"about {rough_duration(reported.run_seconds_left)} left in all")
    return ", ".join(parts)


def _fraction(reported: Reported) -> float | None:
    return reported.done / reported.total if reported.total and reported.done is not None else None
