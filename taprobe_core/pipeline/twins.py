"""A fit of another setting that saw the same: its result is taken over instead of made again.

What a fit saw stands in its manifest (`probes.content`). What does not belong here: solving.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from taprobe_core.keys import Site
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.view import View
from taprobe_core.probes import Fit
from taprobe_core.store import Artifact


def find_twin(
    plan: Plan, site: Site, setting: str, fit: Fit, view: View, content: str
) -> Artifact | None:
    """Return a stored fit of another setting of the study that saw the same; None without one.

    Args:
        plan: the plan.
        site: model and layer of both.
        setting: that of the fit.
        fit: recipe and seed of both.
        view: rows and attention of both.
        content: `probes.Contents.of` the fit.
    """
    for other in plan.study.settings:
        if other == setting:
            continue
        found = plan.store.adopt(plan.fit(site, other, fit.recipe, fit.seed, view))
        if found is not None and found.manifest.provenance.get("content_sha256") == content:
            return found
    return None


def take_over(twin: Artifact, folder: Path) -> None:
    """Copy a twin's files into a folder.

    Raises:
        CorruptArtifactError: a file is not what the twin's manifest says.
    """
    for name in twin.manifest.files:
        shutil.copyfile(twin.file(name), folder / name)
