"""The demo world on disk: built once per data folder, whole or not at all."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from taprobe_core.demo import DEMO_CODE_VERSION, DemoWorld, demo_world
from taprobe_core.store import fingerprint
from taprobe_core.store.disk import disk_errors
from taprobe_core.study import DemoSource, Study

_log = logging.getLogger(__name__)


def ensure_demo_world(study: Study, source: DemoSource, root: Path) -> DemoWorld:
    """Return the demo world of a study, building it under `root` on first use.

    Args:
        study: names the model folders, the settings and the sampling folder.
        source: size and seed of the world.
        root: folder of all demo worlds; the world's own folder is named by its fingerprint.

    Raises:
        ConfigError: a setting that the demo does not have.
        DiskFullError: no space left.
        ArtifactError: the folder cannot be written.
    """
    model_dirs = sorted({model.rollouts_dir for model in study.models.values()})
    config = {
        "source": source.model_dump(mode="json"),
        "model_dirs": model_dirs,
        "sampling": study.rollouts.sampling,
        "settings": list(study.settings),
    }
    folder = root / fingerprint("demo", DEMO_CODE_VERSION, config, [])
    world = DemoWorld(folder / "rollouts", folder / "tokenizer")
    if folder.is_dir():
        return world
    _log.info("demo world: sampling rollouts of the demo's reasoner, once")
    with disk_errors(str(root)):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=root) as temporary:
            built = Path(temporary) / "world"
            demo_world(built, source, model_dirs, study.rollouts.sampling, study.settings)
            try:
                built.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process built the same world first
                    raise
    return world
