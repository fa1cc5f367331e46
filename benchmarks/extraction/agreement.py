"""Do two ways read the same states? Bit-equal texts, and the largest difference in units of rms.

The reference is the library's own forward pass with a hook on every block, pooled by one plain
function; it differs from `hidden_states` in the last layer alone, which the library norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.extraction.reading import Collector, hooked, ids_of
from benchmarks.extraction.texts import Text
from benchmarks.extraction.timing import Job, Rows


class Agreement(NamedTuple):
    """How near rows are to the reference.

    Attributes:
        n_equal: texts whose rows are all bit-equal.
        n_texts: texts compared.
        worst: largest difference over the reference's root mean square, of all texts and layers.
    """

    n_equal: int
    n_texts: int
    worst: float


def reference(causal: Any, texts: Sequence[Text], job: Job, folder: Path) -> Rows:
    """Return a job's states or float32 rows from hooks on the library's own full pass."""
    found: Rows = {}
    with torch.inference_mode():
        for text in texts:
            device = next(causal.parameters()).device
            collector = Collector(text, job)
            with hooked(causal.model.layers, collector, job.layers):
                causal.model(input_ids=ids_of(text, device), use_cache=False)
            found[text.problem_id] = collector.finish(folder)
    return found


def compare(rows: Rows, expected: Rows, last_normed: int | None = None) -> Agreement | None:
    """Compare rows or states with the reference's; None where there are none.

    Args:
        rows: of the variant, problem to layer to [row, d_model]; a layer that is absent, and
            leading rows that are absent, are not compared.
        expected: of the reference.
        last_normed: a layer to leave out, because the variant gives it after the final norm.
    """
    n_equal, n_texts, worst = 0, 0, 0.0
    for problem_id, by_layer in rows.items():
        is_equal = True
        layers = [layer for layer in by_layer if layer != last_normed]
        for layer in layers:
            theirs = expected[problem_id][layer]
            mine = by_layer[layer].to(theirs.device)
            theirs = theirs[-len(mine) :]
            is_equal &= torch.equal(mine.to(theirs.dtype), theirs)
            worst = max(worst, relative(mine, theirs))
        n_texts += bool(layers)
        n_equal += is_equal and bool(layers)
    return Agreement(n_equal, n_texts, worst) if n_texts else None


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference over the root mean square of `theirs`."""
    other = theirs.double()
    return float(
        (mine.to(other.device).double() - other).abs().max() / other.square().mean().sqrt()
    )
