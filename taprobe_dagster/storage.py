"""Dagster's own SQLite storage, whose connections wait longer for a busy database.

What belongs here: nothing but the waiting. `dagster.yaml` names the class, so every process that
opens the home (daemon, web server, code server, run worker) imports this module, and with it the
listener below. Dagster has no setting for it: its databases of runs and schedules wait SQLite's
five seconds and its event log thirty, which a busy disk or a backup exceeds.

Source: https://www.sqlite.org/pragma.html#pragma_busy_timeout
"""

from __future__ import annotations

import sqlite3

from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from sqlalchemy import event
from sqlalchemy.engine import Engine

BUSY_TIMEOUT_S = 120
"""How long a statement waits while another process holds the database."""


@event.listens_for(Engine, "connect")
def _wait_while_busy(connection: object, _record: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")


class WaitingSqliteStorage(DagsterSqliteStorage):
    """Dagster's SQLite storage; to name it is to load this module."""
