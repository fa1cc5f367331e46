"""The embedded demo world: problems, a reasoner with known effects, rollouts, a tokenizer.

    task      a task number -> a problem
    rules     what may be said next, and how likely
    wording   how it is said
    policy    the reasoner: drawn from, replayed, solved exactly
    truth     true importances; which problems to take
    trace     the seam: whoever is a `Sampler` can write the world's rollouts
    writer    files in the dataset's own layout
    tokenizer byte-level BPE trained on the policy's traces

Weights do not belong here (`checkpoints`), nor does publishing a folder, which is the store's.
Invariant: a world depends on its arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from taprobe_core.demo.tokenizer import train_tokenizer
from taprobe_core.demo.trace import Sampler
from taprobe_core.demo.truth import choose_problems, true_importance
from taprobe_core.demo.writer import SETTINGS, write_demo_rollouts
from taprobe_core.study.config import DemoSource

DEMO_CODE_VERSION = "1"
"""Changes whenever the same arguments give other bytes; part of fingerprints."""


@dataclass(frozen=True, slots=True)
class DemoWorld:
    """Where a demo world lies.

    Attributes:
        rollouts_folder: a mirror of the dataset's layout.
        tokenizer_folder: `tokenizer.json` and `tokenizer_config.json`.
    """

    rollouts_folder: Path
    tokenizer_folder: Path


def demo_world(
    folder: Path,
    source: DemoSource,
    model_dirs: Sequence[str],
    sampling: str,
    settings: Sequence[str],
    *,
    sampler_of: Callable[[str], Sampler] | None = None,
) -> DemoWorld:
    """Build rollouts and tokenizer under the empty folder `folder`.

    Args:
        folder: existing empty folder, or one to create; the caller publishes it.
        source: size and seed of the world.
        model_dirs: model folders, one model each.
        sampling: sampling folder.
        settings: names from `SETTINGS`.
        sampler_of: who reasons, by model folder; the policy if left out.

    Raises:
        ConfigError: as `write_demo_rollouts`.
        NotEnoughDataError: as `write_demo_rollouts`.
    """
    world = DemoWorld(folder / "rollouts", folder / "tokenizer")
    write_demo_rollouts(
        world.rollouts_folder, source, model_dirs, sampling, settings, sampler_of=sampler_of
    )
    train_tokenizer(world.tokenizer_folder, source)
    return world


__all__ = [
    "DEMO_CODE_VERSION",
    "SETTINGS",
    "DemoWorld",
    "Sampler",
    "choose_problems",
    "demo_world",
    "train_tokenizer",
    "true_importance",
    "write_demo_rollouts",
]
