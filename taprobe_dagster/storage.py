"""Dagster's own SQLite storage, whose connections wait longer for a busy database.

What belongs here: nothing but the waiting. `dagster.yaml` names the class, so every process that
opens the home (daemon, web server, code server, run worker) imports this module, and with it the
listener below. Dagster has no setting for it: its databases of runs and schedules wait SQLite's
five seconds and its event log thirty, which a busy disk or a backup exceeds.

Source: https://www.sqlite.org/pragma.html#pragma_busy_timeout
"""

from __future__ import annotations

import os
import sqlite3

from dagster._config.config_schema import UserConfigSchema
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData
from sqlalchemy import event
from sqlalchemy.engine import Engine

BUSY_TIMEOUT_S = 120
"""How long a statement waits while another process holds the database."""


@event.listens_for(Engine, "connect")
def _wait_while_busy(connection: object, _record: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")


class WaitingSqliteStorage(DagsterSqliteStorage):
    """Dagster's SQLite storage; to name it is to load this module.

    It takes no settings: the databases lie in `DAGSTER_HOME` or, for a `dagster` command in a
    checkout where that is not set, in the folder that our own commands would set it to.
    """

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        """No settings."""
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: object
    ) -> WaitingSqliteStorage:
        """Open or make the databases."""
        home = os.environ.get("DAGSTER_HOME")
        if not home:
            from taprobe_core.pipeline import data_root

            home = str(data_root() / "dagster")
        return cls.from_local(base_dir=home, inst_data=inst_data)
