"""How much longer a tokenizer may make a text, from what its `tokenizer.json` states.

A normaliser that replaces a letter by a megabyte, or doubles it thirty times over, takes all of a
machine's memory in one call that nothing can stop. Its growth is bounded by its own rules, so it is
known before a text is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from taprobe_core.errors import ModelError

MOST_GROWTH = 64
"""Characters that a normaliser may make of one. Real ones replace one by one, or by two or three;
Unicode's own forms make 18 at most."""

_MOST_AFFIX = 64
"""Characters of what a model puts to a piece of a word, or a normaliser before a text."""

_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix", "prefix", "suffix", "replacement")


def check_growth(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a tokenizer that may make a text longer by more than `MOST_GROWTH` times.

    Args:
        content: of a `tokenizer.json`.
        path: the file, for messages.

    Raises:
        ModelError: it does, or its normaliser is not what the format describes.
    """
    growth = 1.0
    try:
        for step in _steps(content.get("normalizer")):
            growth *= _growth(step)
        parts = [content["model"], *_steps(content.get("pre_tokenizer"), "pretokenizers")]
        affix = max((len(part.get(name) or "") for part in parts for name in _AFFIXES), default=0)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            "a tokenizer of a form that is not known", str(path), "fetch the model's own again"
        ) from error
    if growth > MOST_GROWTH:
        raise ModelError(
            f"a normaliser that may make {growth:,.0f} characters of one (at most {MOST_GROWTH} "
            "are taken)",
            f"{path}, normalizer",
            "use the model's own tokenizer.json",
        )
    if affix > _MOST_AFFIX:
        raise ModelError(
            f"a tokenizer that puts {affix:,} characters to each piece of a text (at most "
            f"{_MOST_AFFIX} are taken)",
            str(path),
            "use the model's own tokenizer.json",
        )


def _steps(part: Any, inner: str = "normalizers") -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normaliser or a pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for each in part[inner]:
            yield from _steps(each, inner)
    else:
        yield part


def _growth(step: Mapping[str, Any]) -> float:
    if step.get("type") == "Prepend":
        return 1.0 if len(step["prepend"]) <= _MOST_AFFIX else float(len(step["prepend"]))
    if step.get("type") != "Replace":
        return 1.0
    new, pattern = len(step["content"]), step["pattern"]
    if "String" in pattern:
        # An empty one matches before and after every character.
        return max(1.0, new / len(pattern["String"])) if pattern["String"] else 1.0 + 2 * new
    return 1.0 + new  # an expression may match nothing at all, between any two characters
