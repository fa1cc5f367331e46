r"""Where the command line prints: everything that it says passes here and is made visible.

In: texts and tables. Out: the terminal or a file. A text's control characters come out as `\u001b`
and the like, so that no name of a file and no text of a dataset commands the terminal; the
console's own colours stay.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from taprobe_core.errors import visible

WIDTH_IN_FILES = 140
"""Columns of a table that goes to a file or a pipe."""


class VisibleConsole(Console):
    """A console that makes texts visible: before they are laid out, and once more all of them."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into a text, as a table does with its cells to measure them."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render anything; what is no string, like a log record, is made visible here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def _console(*, stderr: bool = False) -> Console:
    console = VisibleConsole(stderr=stderr, highlight=False, soft_wrap=True)
    return (
        console
        if console.is_terminal
        else VisibleConsole(stderr=stderr, highlight=False, soft_wrap=True, width=WIDTH_IN_FILES)
    )


out = _console()
err = _console(stderr=True)


def print_defect(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an exception that nothing caught, as Python does, made visible: `sys.excepthook`."""
    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))
