"""What goes wrong in `DAGSTER_HOME`, told as what, where and how to fix it.

What belongs here: the one place where exceptions of SQLite, of the file system and of Dagster's
settings become a `HomeError`. Only what certainly comes from the folder is turned: an error of a
study or a defect of ours passes as it is.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import yaml
from alembic.util.exc import CommandError
from dagster import DagsterError
from dagster._check import CheckError
from sqlalchemy.exc import SQLAlchemyError

from taprobe_core.errors import HomeError, TaprobeError

DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
"""The databases that every home has, relative to it; each run has one of its own besides."""

_OF_DATABASES = (SQLAlchemyError, sqlite3.Error, CommandError)
_OF_FULL_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ROOM = 1 << 20
_ADOPTED = "the artifacts are adopted again"


@contextmanager
def answered(home: Path, *, is_preparing: bool = False) -> Iterator[None]:
    """Turn faults of the folder that arise in the block into `HomeError`.

    Args:
        home: the folder.
        is_preparing: the block works on the folder alone, so every `OSError` in it is the folder's;
            else only one that names it, or that says that the disk below it is full.
    """
    try:
        yield
    except TaprobeError:
        raise
    except Exception as error:
        found = _home_error(home, error, is_preparing)
        if found is None:
            raise
        raise found from error


@contextmanager
def settings_answered(home: Path) -> Iterator[None]:
    """Turn what Dagster says against `dagster.yaml` into `HomeError`."""
    settings = home / "dagster.yaml"
    try:
        yield
    except _OF_DATABASES:
        raise
    except (
        DagsterError,
        CheckError,
        yaml.YAMLError,
        UnicodeDecodeError,
        ImportError,
        AttributeError,
        TypeError,
        IsADirectoryError,
        PermissionError,
    ) as error:
        if isinstance(error, OSError) and error.filename != str(settings):
            raise
        raise HomeError(
            f"Dagster does not accept its settings: {_in_short(error)}",
            str(settings),
            f"correct the file, or delete {settings}: the shipped settings are then put there",
        ) from error


def _home_error(home: Path, error: BaseException, is_preparing: bool) -> HomeError | None:
    for each in _chain(error):
        if isinstance(each, _OF_DATABASES):
            return _database_error(home, each)
        if isinstance(each, OSError) and (is_preparing or _is_of(home, each)):
            return _folder_error(home, each)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from; Dagster keeps what an asset raised beside the cause."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [getattr(each, "user_exception", None), each.__cause__, each.__context__]


def _is_of(home: Path, error: OSError) -> bool:
    if error.filename is None and error.errno in _OF_FULL_DISKS:
        # A write does not name its file. The store names its own, so this one is of the folder if
        # there is indeed no room.
        return error.errno == errno.EFBIG or shutil.disk_usage(home).free < _NO_ROOM
    return isinstance(error.filename, str) and Path(error.filename).is_relative_to(home)


def _folder_error(home: Path, error: OSError) -> HomeError:
    reason = error.strerror or str(error)
    if error.errno in _OF_FULL_DISKS:
        fix = "free some space, raise the limit, or set DAGSTER_HOME to another folder"
    else:
        fix = "make the folder writable, or set DAGSTER_HOME to a folder that is"
    return HomeError(f"Dagster's folder cannot be used: {reason}", error.filename or str(home), fix)


def _database_error(home: Path, error: BaseException) -> HomeError:
    """Say which database, by looking at each; SQLite's own messages do not name the file."""
    text = _in_short(error)
    for path in (home / name for name in DATABASES):
        if fault := _fault_of(path):
            return HomeError(
                f"a database of Dagster is damaged ({fault})",
                str(path),
                f"delete the folder {home} and run the command again; {_ADOPTED}",
            )
    if "locked" in text or "busy" in text:
        return HomeError(
            f"a database of Dagster stayed locked by another process: {text}",
            str(home),
            f"end that process (fuser {home}/history/*.db names it) and run the command again",
        )
    if any(word in text for word in ("full", "disk I/O", "readonly", "unable to open")):
        return HomeError(
            f"a database of Dagster cannot be written: {text}",
            str(home),
            "free some space, make the folder writable for you, or set DAGSTER_HOME to another "
            f"folder; {_ADOPTED}",
        )
    return HomeError(
        f"a database of Dagster cannot be used: {text}",
        str(home),
        f"delete the folder {home} and run the command again; {_ADOPTED}",
    )


def _fault_of(path: Path) -> str | None:
    """What is wrong with a database file; None for one that is sound, absent, locked or unread."""
    if not path.exists():
        return None
    if not path.is_file():
        return "not a file"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=1)) as database:
            ((verdict,),) = database.execute("PRAGMA quick_check(1)").fetchall()
            heads = database.execute("SELECT count(*) FROM alembic_version").fetchone()[0]
    except sqlite3.OperationalError as error:
        return "its schema is not complete" if "no such table" in str(error) else None
    except sqlite3.DatabaseError as error:
        return str(error)
    if verdict != "ok":
        return str(verdict)
    if heads != 1:
        return f"{heads} versions of its schema, as two processes leave that make it at once"
    return None


def _in_short(error: BaseException) -> str:
    """The first lines of a message, without the statement and its values."""
    text = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return " ".join(text.split("[SQL:")[0].split())[:300]
