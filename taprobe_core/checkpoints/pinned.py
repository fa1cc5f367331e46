"""What of a model's files is pinned: where they come from, and what they were made with.

From an origin, or a stand-in's specification, to the source that `store.pins` compares. Which files
of it decide the model is said by those who read them (`resolve`, `tokenizer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from taprobe_core.checkpoints.origin import HubRepository, Origin
from taprobe_core.demo import BUNDLE
from taprobe_core.demo.bundle import MANIFEST, read_manifest
from taprobe_core.errors import ModelError
from taprobe_core.store import PinnedSource
from taprobe_core.store.integrity import file_sha256
from taprobe_core.store.sealed import sealed_files


def pinned_origin(origin: Origin, noun: str) -> PinnedSource:
    """Return what is pinned of a folder or of a hub repository's commit.

    Args:
        origin: where the files are.
        noun: checkpoint or tokenizer.
    """
    if isinstance(origin, HubRepository):
        return PinnedSource(
            noun,
            {"kind": "hub", "repo": origin.repo, "revision": origin.revision},
            Path(f"{origin.repo}@{origin.revision}"),
            origin.remedy,
            ModelError,
            "is_fetched_again",
        )
    if origin.path.parent == BUNDLE:
        return PinnedSource(
            noun,
            {
                "kind": "bundle",
                "name": origin.path.name,
                # A newer version brings other files, which are no change of these.
                "manifest_sha256": file_sha256(BUNDLE / MANIFEST),
            },
            origin.path,
            "reinstall taprobe, or restore the file from version control",
            ModelError,
            expected=lambda: _bundled(origin.path.name),
        )
    return PinnedSource(
        noun,
        {"kind": "folder", "folder": str(origin.path)},
        origin.path,
        "bring the files back as they were",
        ModelError,
    )


def pinned_stand_in(folder: Path) -> PinnedSource:
    """Return what is pinned of a stand-in checkpoint."""
    return PinnedSource(
        "checkpoint",
        {"kind": "stand_in", "folder": folder.name},
        folder,
        f"remove {folder}, which is built again",
        ModelError,
        "is_made_again",
        sealed_files(folder),
    )


def _bundled(name: str) -> Mapping[str, str]:
    """Hashes of one bundled reasoner's files, by name."""
    start = f"{name}/"
    return {
        path.removeprefix(start): sha256
        for path, sha256 in read_manifest(BUNDLE)["sha256"].items()
        if path.startswith(start)
    }
