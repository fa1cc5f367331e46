"""Open a plan from a study file and a data folder: the first line of every notebook and command."""

from __future__ import annotations

import os
from pathlib import Path

from taprobe_core.pipeline.plan import Plan
from taprobe_core.store import Store
from taprobe_core.study import Study, load_study


def data_root(folder: Path | str | None = None) -> Path:
    """The folder that holds everything taprobe writes.

    Args:
        folder: the folder; None takes the environment's `TAPROBE_DATA`, else `.taprobe` in the
            working directory.
    """
    return Path(folder or os.environ.get("TAPROBE_DATA") or ".taprobe").expanduser().absolute()


def open_plan(study: Study | Path | str | None = None, folder: Path | str | None = None) -> Plan:
    """Open a study on a data folder.

    Args:
        study: a study, or the path of its file; None takes `TAPROBE_STUDY`, else the bundled demo.
        folder: see `data_root`.

    Raises:
        ConfigError: the study file is wrong.
        ArtifactError: the folder cannot be written.
    """
    root = data_root(folder)
    loaded = study if isinstance(study, Study) else load_study(study)
    return Plan(loaded, Store(root / "artifacts"), root)
