"""`DAGSTER_HOME`, handled for the user: beside the artifacts, with the shipped settings."""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg

from taprobe_core.errors import ConfigError
from taprobe_core.pipeline import data_root

SETTINGS = Path(__file__).resolve().parent.parent / "dagster.yaml"


def prepare_home() -> Path:
    """Set `DAGSTER_HOME` unless it is set, give it our `dagster.yaml`, and return it.

    Raises:
        ConfigError: the shipped settings are not where they should be.
    """
    home = Path(os.environ.get("DAGSTER_HOME") or data_root() / "dagster").absolute()
    home.mkdir(parents=True, exist_ok=True)
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
    settings = home / "dagster.yaml"
    if not settings.exists():
        if not SETTINGS.exists():
            raise ConfigError(
                "the shipped dagster.yaml is missing", str(SETTINGS), "work from a checkout"
            )
        settings.write_text(SETTINGS.read_text())
    return home


def open_instance() -> dg.DagsterInstance:
    """The persistent Dagster instance of `prepare_home`."""
    prepare_home()
    return dg.DagsterInstance.get()
