"""The embedded demo world: problems, reasoners with known effects, rollouts, a truth.

    task       a task number -> a problem; what a reasoner gives for it
    rules      what may be said next, and how likely
    wording    how it is said
    policy     the teacher: drawn from, replayed, solved exactly; reads texts back
    truth      true importances; which problems to take; published measures

    tokenizer  byte-level BPE trained on the policy's traces
    bundle     what comes with the library: weights, texts, truth; `tools/demo` makes it

    writer     files in the dataset's own layout; a copy with every kind of damage
    world      the bundled world, and the policy's at any size

Extracting activations does not belong here, nor does publishing a folder, which is the store's.
Invariant: a world depends on its arguments alone.
"""

from __future__ import annotations

from taprobe_core.demo.bundle import BUNDLE, SAMPLING
from taprobe_core.demo.task import SETTINGS
from taprobe_core.demo.truth import choose_problems, true_importance
from taprobe_core.demo.world import DemoWorld, write_demo_world, write_policy_world

DEMO_CODE_VERSION = "2"
"""Changes whenever the same arguments give other bytes; part of fingerprints."""

__all__ = [
    "BUNDLE",
    "DEMO_CODE_VERSION",
    "SAMPLING",
    "SETTINGS",
    "DemoWorld",
    "choose_problems",
    "true_importance",
    "write_demo_world",
    "write_policy_world",
]
