"""`DAGSTER_HOME`, handled for the user: beside the artifacts, with the shipped settings.

The schemas of its three databases are made here, once, under a lock, before a server, a daemon or a
run starts: two processes that make them at the same time leave a folder that Dagster never opens
again. Every fault of the folder is answered as a `HomeError`, because the cure is always at hand:
nothing in it is needed, and a fresh one adopts the artifacts by fingerprint.

Concept: https://docs.dagster.io/deployment/oss/dagster-yaml
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from dagster._core.instance.config import PoolGranularity
from dagster._core.instance.ref import InstanceRef
from rich.markup import escape

from taprobe_core.cli.console import err
from taprobe_core.errors import ConfigError, HomeError
from taprobe_core.pipeline import data_root
from taprobe_core.pipeline.data_folder import checked_folder
from taprobe_dagster.home_faults import answered, settings_answered
from taprobe_dagster.resources import GPU_POOL
from taprobe_dagster.storage import BUSY_TIMEOUT_S

SETTINGS = Path(__file__).resolve().parent.parent / "dagster.yaml"

_SHIPPED_BEFORE = {
    "d787577004c26e5e0832fcbc36b10220f60d23bdb6f1de4106dd330a25f078b0",
    "d288a4ec0a8437198c4eb9c1d5cbbbb092c9925cc618823600bfc409331a06c8",
}
"""Digests of earlier `dagster.yaml`; a folder that has one of these gets today's."""

_LONGEST = "history/runs/12345678-1234-1234-1234-123456789012.db-journal"
_LOCKED_S = 5 * BUSY_TIMEOUT_S
_MAX_SQLITE_PATH = 512
"""Bytes that SQLite takes as a file's path."""


def prepare_home() -> Path:
    """Set `DAGSTER_HOME` unless it is set, give it our `dagster.yaml` and its databases.

    Any number of processes may call this on one folder at once.

    Returns:
        The folder. Its databases have their schemas, and pool `gpu` has its limit.

    Raises:
        ConfigError: the shipped settings are not where they should be.
        HomeError: the folder, its settings or a database cannot be used.
    """
    named = os.environ.get("DAGSTER_HOME")
    home = checked_folder(named, "DAGSTER_HOME") if named else data_root() / "dagster"
    if len(os.fsencode(home / _LONGEST)) > _MAX_SQLITE_PATH:
        raise HomeError(
            f"the path takes {len(os.fsencode(home))} bytes, too many for SQLite",
            f"DAGSTER_HOME ({home})",
            "set DAGSTER_HOME to a folder with a shorter path",
        )
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
    with answered(home, is_preparing=True):
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home / ".prepare.lock"):
            _give_settings(home)
            with _open(home) as instance:
                _limit_pool(instance)
    return home


@contextmanager
def open_instance() -> Iterator[dg.DagsterInstance]:
    """The persistent Dagster instance of `prepare_home`.

    Raises:
        HomeError: the folder cannot be used, or fails while the block runs.
    """
    home = prepare_home()
    with answered(home), _open(home) as instance:
        if instance.event_log_storage.get_pool_config().pool_granularity == PoolGranularity.RUN:
            err.print(
                f"{escape(str(home / 'dagster.yaml'))} says pools: {{granularity: run}}, so a "
                "command and the UI may extract side by side; set it to op"
            )
        yield instance


@contextmanager
def _open(home: Path) -> Iterator[dg.DagsterInstance]:
    with settings_answered(home):
        ref = InstanceRef.from_dir(str(home))
        instance = dg.DagsterInstance.from_ref(ref)
        # Made at their first use, which would be in the middle of a run.
        _ = (instance.run_launcher, instance.run_coordinator, instance.scheduler)
    with instance:
        yield instance


def _limit_pool(instance: dg.DagsterInstance) -> None:
    """Set the limit before the first run: Dagster sets it only after it has let that one go."""
    log = instance.event_log_storage
    if GPU_POOL in log.get_concurrency_keys():
        return
    if instance.global_op_concurrency_default_limit is not None:
        log.initialize_concurrency_limit_to_default(GPU_POOL)
    else:
        log.set_concurrency_slots(GPU_POOL, 1)


def _give_settings(home: Path) -> None:
    settings = home / "dagster.yaml"
    if settings.exists() and (
        not settings.is_file()
        or hashlib.sha256(settings.read_bytes()).hexdigest() not in _SHIPPED_BEFORE
    ):
        return
    if not SETTINGS.exists():
        raise ConfigError(
            "the shipped dagster.yaml is missing", str(SETTINGS), "work from a checkout"
        )
    part = settings.with_name(f".dagster.yaml.{os.getpid()}")
    try:
        part.write_text(SETTINGS.read_text())
        part.replace(settings)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel frees however its holder ends."""
    with path.open("a") as file:
        begun = time.monotonic()
        is_said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in {errno.EAGAIN, errno.EACCES}:
                    raise
            if not is_said and time.monotonic() - begun > 5:
                err.print(f"another command prepares {escape(str(path.parent))}; waiting")
                is_said = True
            if time.monotonic() - begun > _LOCKED_S:
                raise HomeError(
                    f"another process has held the lock for {_LOCKED_S} s",
                    str(path),
                    f"end it (fuser {path} names it) and run the command again",
                )
            time.sleep(0.05)
        yield
