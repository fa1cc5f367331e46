"""The demo world on disk: written once per data folder, whole or not at all, and then sealed."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taprobe_core.demo import BUNDLE, DEMO_CODE_VERSION, DemoWorld, write_demo_world
from taprobe_core.demo.bundle import MANIFEST, verify_files
from taprobe_core.demo.world import write_policy_world
from taprobe_core.store import PinnedSource, fingerprint
from taprobe_core.store.disk import disk_errors
from taprobe_core.store.integrity import file_sha256
from taprobe_core.store.local import seal_folder, sealed_files
from taprobe_core.study import DemoSource, PolicySource, Study

_log = logging.getLogger(__name__)


def ensure_demo_world(study: Study, source: DemoSource | PolicySource, root: Path) -> DemoWorld:
    """Return the demo world of a study, writing it under `root` on first use.

    Args:
        study: names the policy's model folders, settings and sampling folder.
        source: which world, and its size.
        root: folder of all demo worlds; the world's own folder is named by its fingerprint.

    Raises:
        ConfigError: a setting that the demo does not have.
        PlanError: more problems or rollouts than are bundled.
        CorruptArtifactError: a bundled file is not what was built.
        DiskFullError: no space left.
        ArtifactError: the folder cannot be written.
    """
    if isinstance(source, DemoSource):

        def unpack(folder: Path) -> None:
            verify_files(BUNDLE)
            write_demo_world(folder, source)

        return _once(root, _bundled_config(source), unpack)
    model_dirs = sorted({model.rollouts_dir for model in study.models.values()})
    config = {
        "source": source.model_dump(mode="json"),
        "model_dirs": model_dirs,
        "sampling": study.rollouts.sampling,
        "settings": list(study.settings),
    }

    def draw(folder: Path) -> None:
        write_policy_world(folder, source, model_dirs, study.rollouts.sampling, study.settings)

    return _once(root, config, draw)


def pinned_world(world: DemoWorld) -> PinnedSource:
    """Return what is pinned of a demo world: names are paths inside its folder."""
    folder = world.rollouts_folder.parent
    return PinnedSource(
        "dataset",
        {"kind": "demo_world", "folder": folder.name},
        folder,
        f"remove {folder}, which is written again",
        absence="is_made_again",
        expected=sealed_files(folder),
    )


def _bundled_config(source: DemoSource) -> dict[str, Any]:
    return {
        "source": source.model_dump(mode="json"),
        "bundle": file_sha256(BUNDLE / MANIFEST),
    }


def _once(root: Path, config: dict[str, Any], write: Callable[[Path], None]) -> DemoWorld:
    # Folders of an earlier layout have no manifest, and are not trusted without one.
    named = {**config, "layout": "sealed"}
    folder = root / fingerprint("demo", DEMO_CODE_VERSION, named, [])
    if folder.is_dir():
        return DemoWorld.at(folder)
    _log.info("demo world: writing its rollouts, once")
    with disk_errors(str(root)):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=root) as temporary:
            built = Path(temporary) / "world"
            write(built)
            seal_folder(built)
            try:
                built.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process built the same world first
                    raise
    return DemoWorld.at(folder)
