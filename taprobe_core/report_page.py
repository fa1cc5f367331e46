"""The report's template, and how it writes values.

What the page says belongs in `report`. Invariant: no value can become markup. Every string is
escaped, and characters that would reorder or hide text are shown as symbols (`visible_text`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from taprobe_core.findings import CORRECTION_LABELS, METRIC_LABELS, VERDICT_LABELS, p_text
from taprobe_core.selection import ANY_ACTIVATION_PROBE
from taprobe_core.visible_text import visible


def report_template() -> jinja2.Template:
    """Return the template of the page; it escapes every value that it is given."""
    source = resources.files("taprobe_core").joinpath("report.html.jinja").read_text("utf-8")
    return _environment().from_string(source)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=_num, signed=_signed, share=_share, p_value=p_text, csp_hash=_csp_hash, layers=_layers
    )
    environment.globals.update(
        verdict_labels=VERDICT_LABELS,
        correction_labels=CORRECTION_LABELS,
        metric_labels=METRIC_LABELS,
        any_probe=ANY_ACTIVATION_PROBE,
    )
    return environment


def _shown(value: Any) -> Any:
    if value is None:
        return "–"
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _num(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.3f}".replace("-", "\u2212")


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _csp_hash(css: str) -> str:
    digest = hashlib.sha256(str(css).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _layers(chosen: Sequence[str]) -> str:
    """Say `recipe@L02` of every choice in words, the layers of a recipe together."""
    found: dict[str, list[str]] = {}
    for candidate in chosen:
        recipe, _, layer = candidate.rpartition("@L")
        found.setdefault(recipe, []).append(str(int(layer)))
    return "; ".join(f"{recipe} at {', '.join(layers)}" for recipe, layers in found.items())
