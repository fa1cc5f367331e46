"""One writer per partition: a lock that the kernel releases when its owner dies.

Turns a folder into a critical section. What is done inside belongs to `local`. Invariant: two
processes, or two threads, are never inside at once; nobody has to clean up after a dead owner.
The owner file beside the lock only serves the message; the lock itself is `flock`.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from taprobe_core.errors import BusyArtifactError
from taprobe_core.store.disk import write_bytes

LOCK_NAME = ".lock"
OWNER_NAME = ".lock.owner"
POLL_S = 0.01
"""How often a waiting writer asks for the lock, in seconds."""

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def hold_lock(folder: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock of `folder` for the duration of the block.

    Args:
        folder: an existing folder.
        timeout_s: how long to wait for another owner, in seconds.

    Raises:
        BusyArtifactError: still held after `timeout_s`; names host, pid and run of the owner.
        OSError: the folder is gone or read-only, or its file system has no locks.
    """
    descriptor = _wait(folder, timeout_s)
    owner = folder / OWNER_NAME
    try:
        write_bytes(owner, json.dumps(vars(this_process())).encode())
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)
    finally:
        # Closing alone would leave the lock to a child that was forked meanwhile.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _wait(folder: Path, timeout_s: float) -> int:
    """Return a descriptor that holds the lock."""
    deadline = time.monotonic() + timeout_s
    while (descriptor := _try_lock(folder / LOCK_NAME)) is None:
        if time.monotonic() >= deadline:
            raise BusyArtifactError(
                f"another process has been writing here for over {timeout_s:g} s "
                f"({_owner(folder)})",
                str(folder),
                "wait until it ends and run again; if it hangs, stop it: its lock goes with it",
            )
        time.sleep(POLL_S)
    return descriptor


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, _FLAGS, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A lock whose name was deleted meanwhile excludes nobody who comes after.
        is_held = os.fstat(descriptor).st_nlink > 0
    except BlockingIOError:
        is_held = False
    except BaseException:
        os.close(descriptor)
        raise
    if is_held:
        return descriptor
    os.close(descriptor)
    return None


@dataclass(frozen=True)
class Owner:
    """A process that writes; `run_id` is TAPROBE_RUN_ID where set, `since` is UTC."""

    host: str
    pid: int
    run_id: str | None
    since: str


def this_process() -> Owner:
    """Describe this process, now."""
    return Owner(
        host=_host(),
        pid=os.getpid(),
        run_id=os.environ.get("TAPROBE_RUN_ID"),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@cache
def _host() -> str:
    return os.uname().nodename


def _owner(folder: Path) -> str:
    try:
        owner = Owner(**json.loads((folder / OWNER_NAME).read_text(encoding="ascii")))
    except (OSError, ValueError, TypeError):
        return "owner unknown"
    return f"host {owner.host}, pid {owner.pid}, run {owner.run_id}, since {owner.since}"
