"""How each estimator is solved, and how a stored probe of it decides.

What is known of an estimator beside that (settings, what it reads, what a sweep tunes) stands in
its entry in `study.estimators`, under the same name.
"""

from __future__ import annotations

from taprobe_core.probes.dense import LINEAR, MLP
from taprobe_core.probes.fitted import SOLVERS as SOLVERS
from taprobe_core.probes.fitted import TOKEN_SETS

SOLVERS.update(
    linear=LINEAR,
    mlp=MLP,
    attention=TOKEN_SETS,
    multimax=TOKEN_SETS,
    rolling_multimax=TOKEN_SETS,
)
