"""The data folder, and opening a study on it: the first line of every notebook and command."""

from __future__ import annotations

import os
from pathlib import Path

from taprobe_core.errors import ConfigError
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stages import STAGES
from taprobe_core.store import Store
from taprobe_core.study import Study, load_study

_MAX_NAME = 255
"""Bytes of one name in a path, on every common file system."""


def data_root(folder: Path | str | None = None) -> Path:
    """The folder that holds everything taprobe writes.

    Args:
        folder: the folder; None takes the environment's `TAPROBE_DATA`, else `.taprobe` in the
            working directory.

    Raises:
        ConfigError: no folder can have this path.
    """
    if folder:
        return checked_folder(folder, "the data folder")
    return checked_folder(os.environ.get("TAPROBE_DATA") or ".taprobe", "TAPROBE_DATA")


def checked_folder(folder: Path | str, where: str) -> Path:
    """An absolute path from what a user wrote, which need not exist.

    Args:
        folder: the path, with `~` for somebody's home folder.
        where: the name of the setting, for the message.

    Raises:
        ConfigError: no folder can have this path.
    """

    def error(what: str, fix: str) -> ConfigError:
        return ConfigError(what, f"{where} ({ascii(str(folder))[1:-1]})", fix)

    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise error("the path is not UTF-8", "choose a path in UTF-8") from None
    try:
        path = Path(folder).expanduser().absolute()
    except RuntimeError:
        raise error("nobody has this home folder", "write the path in full") from None
    longest = max(len(part.encode()) for part in path.parts)
    if longest > _MAX_NAME:
        raise error(
            f"a name in the path takes {longest} bytes, and {_MAX_NAME} are allowed",
            "choose a shorter name",
        )
    return path


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
    return Plan(loaded, Store(root / "artifacts"), root, STAGES)
