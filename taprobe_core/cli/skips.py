"""Problems left out, as a reader sees them: how many, and the reason of each.

In: rows of `pipeline.skips`. Out: lines to print, escaped.
"""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl
from rich.markup import escape


def render_skips(skipped: pl.DataFrame, shown: int, *, is_fatal: bool = False) -> Iterator[str]:
    """Yield a heading and a line per problem; nothing where none is left out.

    Args:
        skipped: `tables.SKIPPED` with model and setting.
        shown: the most problems to name; the others are counted.
        is_fatal: whether the study stops at such a problem.
    """
    if skipped.is_empty():
        return
    what = (
        "stop the run (set rollouts.on_bad_problem: skip to leave them out)"
        if is_fatal
        else "left out"
    )
    yield f"[bold yellow]{len(skipped)} problem(s) {what}[/]"
    for row in skipped.head(shown).iter_rows(named=True):
        place = f"{row['model']}, {row['setting']}, problem {row['problem_id']}"
        yield f"  {escape(place)} ({row['stage']}): {escape(row['what'])}"
    if len(skipped) > shown:
        yield f"  ... and {len(skipped) - shown} more: `taprobe check --json` lists them"
