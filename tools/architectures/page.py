"""Verdicts to `docs/architectures.md`, and the page's rows back.

What does not belong here: judging (sweep).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
import transformers

from tools.architectures.agreement import HALF_FACTOR, TOLERANCE
from tools.architectures.sweep import LENGTHS, SEED, Verdict

_HEAD = """# Architectures

Which causal models of transformers this library reads, and which it refuses. Made by
`make architectures` with transformers {transformers} and PyTorch {torch}; a test asks for a new
page when the installed version is another. Do not edit it by hand.

Of each causal model type a tiny checkpoint with random weights is written: four layers that hold
every kind of layer that the type has by default, and windows and chunks of 8 to 32 tokens. It is
loaded and read as a study's checkpoint is (by `attn_implementation: eager` where it is refused
without), on a CPU in float32, with texts of {lengths} tokens, and compared with transformers alone:
eager attention, one text at a time, by a model that has seen no other text.

- *alone*: each text in a pass of its own; all layers; the poolings mean, last, max, boundary and
  tokens.
- *packed*: the same with room for all texts in one pack. Models whose attention is not known here,
  and texts that reach past a window, go one by one even then.
- *attention*: the attention between sentences, full and light, alone and packed, of the layers that
  attend, beside sums over the tables that eager attention hands out.

*equal*: no difference, of a text, layer and pooling, above {tolerance:g} of the norm; the largest
found is {worst:.1e}. *refused*: a named error before anything is kept, with its reason. *not
built*: no tiny checkpoint of it could be made, with what stood in the way.

{counts}

| model type | class | alone | packed | attention | reason |
|---|---|---|---|---|---|
"""

_FUZZ = """
## Drawn configurations

Of the commonest architectures {n} further configurations are drawn by seed: windows and where they
hold, chunks, kinds and lengths of rotary factors, partial rotation, head widths, grouped queries,
biases, norms of queries and keys, capped scores, tied weights, float32 and bfloat16, 2 to 5 texts
of 2 to 200 tokens. In bfloat16 eager attention itself is off, by its rounding, from the same
weights in float32; the states here may be off by {factor:g} times that.

{counts} Reasons of the refusals:

{reasons}
"""


def page_of(verdicts: Sequence[Verdict]) -> str:
    """Return the page.

    Args:
        verdicts: of all causal types, and of drawn configurations.
    """
    types = sorted((each for each in verdicts if not is_drawn(each)), key=lambda each: each.name)
    drawn = [each for each in verdicts if is_drawn(each)]
    worst = max((value for each in types for value in each.relative.values()), default=0.0)
    head = _HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        lengths=", ".join(map(str, sorted(LENGTHS))),
        tolerance=TOLERANCE,
        worst=worst,
        counts=_counts(types),
    )
    page = head + "\n".join(_row(each) for each in types) + "\n"
    if drawn:
        reasons = Counter(
            _kind(each.reason)
            for each in drawn
            if {"refused", "not built"} & {each.alone, each.packed, each.attention}
        )
        listed = "\n".join(f"- {n} ×: {reason}" for reason, n in reasons.most_common())
        page += _FUZZ.format(
            n=len(drawn), factor=HALF_FACTOR, counts=_counts(drawn), reasons=listed or "none"
        )
    return page


def is_drawn(verdict: Verdict) -> bool:
    """Whether a verdict is of a drawn configuration."""
    return verdict.name.startswith(SEED)


def rows_of(page: str) -> dict[str, list[str]]:
    """Return the cells of each model type's row: class, alone, packed, attention, reason.

    Args:
        page: from `page_of`.
    """
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def _row(verdict: Verdict) -> str:
    said = verdict.detail if not verdict.is_right else verdict.reason
    cells = (verdict.kind, verdict.alone, verdict.packed, verdict.attention, _cell(said))
    return f"| `{verdict.name}` | {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def _kind(reason: str) -> str:
    """A reason without the numbers of its case, and of several faults the first."""
    return re.sub(r"(?<![a-wyz])\d+", "n", _cell(reason).partition(";")[0])


def _counts(verdicts: Sequence[Verdict]) -> str:
    ways = ("alone", "packed", "attention")
    by_way = {way: Counter(getattr(each, way) for each in verdicts) for way in ways}
    parts = (
        f"{way}: " + ", ".join(f"{n} {word}" for word, n in counts.most_common())
        for way, counts in by_way.items()
    )
    return f"{len(verdicts)} in all. " + "; ".join(parts).capitalize() + "."
