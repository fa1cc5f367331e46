"""One writer per partition: a lock that the kernel releases when its owner dies.

Turns a folder into a critical section. What is done inside belongs to `local`. Invariant: two
processes, or two threads, are never inside at once; nobody has to clean up after a dead owner.
The owner file beside the lock only serves the message; the lock itself is `flock`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from taprobe_core.errors import BusyArtifactError

LOCK_NAME = ".lock"
OWNER_NAME = ".lock.owner"


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
    # A soft lock would outlive a killed owner, so a file system without flock is refused instead.
    lock = FileLock(folder / LOCK_NAME, timeout=timeout_s, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise BusyArtifactError(
            f"another process has been writing here for over {timeout_s:g} s ({_owner(folder)})",
            str(folder),
            "wait until it ends and run again; if it hangs, stop it: its lock goes with it",
        ) from None
    try:
        (folder / OWNER_NAME).write_text(json.dumps(asdict(this_process())), encoding="ascii")
        try:
            yield
        finally:
            (folder / OWNER_NAME).unlink(missing_ok=True)
    finally:
        lock.release()


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
        host=os.uname().nodename,
        pid=os.getpid(),
        run_id=os.environ.get("TAPROBE_RUN_ID"),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _owner(folder: Path) -> str:
    try:
        owner = Owner(**json.loads((folder / OWNER_NAME).read_text(encoding="ascii")))
    except (OSError, ValueError, TypeError):
        return "owner unknown"
    return f"host {owner.host}, pid {owner.pid}, run {owner.run_id}, since {owner.since}"
