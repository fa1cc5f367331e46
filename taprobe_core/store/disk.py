"""What survives a crash, what a full disk says, and one writer per partition.

Turns folders into durable folders, operating system errors into errors a user can act on, and a
folder into a critical section. What is written where belongs in `local`.

Invariants: whatever has to be on the disk before a rename is there before the rename. Two
processes, or two threads, are never inside a lock at once; nobody has to clean up after a dead
owner, because the lock is the kernel's `flock` and is released when its owner dies. The owner file
beside it only serves the message.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from taprobe_core.errors import ArtifactError, BusyArtifactError, DiskFullError, TaprobeError

TEMPORARY = ".tmp-"

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Parquet and safetensors writers are no OSError; they give the code in the text alone.
_CODE_TEXT = re.compile(r"\(os error (\d+)\)")
_FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded")
_FILE_LIBRARIES = ("polars", "safetensors")


def temporary_name(label: str) -> str:
    """A name that no other process uses and that readers skip."""
    return f"{TEMPORARY}{label}-{os.getpid()}-{secrets.token_hex(4)}"


def write_bytes(path: Path, *parts: bytes | memoryview, is_synced: bool = False) -> None:
    """Write a file anew, with one system call a part, for these are most of a small file's cost.

    Args:
        path: the file.
        parts: its bytes, in order; a memoryview holds single bytes.
        is_synced: flush them to the disk too.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[os.write(descriptor, left) :]
        if is_synced:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_path(path: Path | str) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path | str) -> None:
    """Flush every file and folder below `folder`, each folder after what it holds."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            (sync_tree if entry.is_dir(follow_symlinks=False) else sync_path)(entry.path)
    sync_path(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; the entry of each new one is on the disk afterwards."""
    missing = [folder] if not folder.is_dir() else []
    while missing and not missing[-1].parent.is_dir():
        missing.append(missing[-1].parent)
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync_path(each.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one step; its folder still has to be flushed.

    A reader sees the old or the new text, also after a power cut.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        write_bytes(temporary, text.encode("ascii"), is_synced=True)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def disk_errors(
    where: str, estimate_bytes: int = 0, free_bytes: Callable[[], int | None] = lambda: None
) -> Iterator[None]:
    """Turn the operating system's errors inside the block into errors of the store.

    Args:
        where: the folder concerned, for the message.
        estimate_bytes: bytes that the block wants to write, 0 if not known.
        free_bytes: asks how many bytes are free, None if not known.

    Raises:
        DiskFullError: no space, no quota or a file-size limit, whoever reported it.
        ArtifactError: any other `OSError`; network errors pass unchanged, they may be retried.
    """
    try:
        yield
    except TaprobeError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(where, estimate_bytes, free_bytes, str(error)) from error
        if is_system_error(error):
            raise ArtifactError(
                f"the artifact could not be read or written: {error}",
                where,
                "check that the folder exists and is writable, and its disk, then run again",
            ) from error
        raise


def check_room(where: str, estimate_bytes: int, free_bytes: Callable[[], int | None]) -> None:
    """Refuse to write where less than twice the estimated size is free.

    Args:
        where: the folder concerned, for the message.
        estimate_bytes: bytes that are to be written.
        free_bytes: asks how many bytes are free, None if not known.

    Raises:
        DiskFullError: too few are.
    """
    free = free_bytes()
    if free is not None and free < 2 * estimate_bytes:
        raise disk_full(where, 2 * estimate_bytes, lambda: free, "checked before writing")


def disk_full(
    where: str, needed_bytes: int, free_bytes: Callable[[], int | None], reason: str
) -> DiskFullError:
    """Build the error for a full disk: folder, bytes needed, bytes free."""
    try:
        free = free_bytes()
    except OSError:
        free = None
    needed = f"{needed_bytes} bytes needed" if needed_bytes else "bytes needed not estimated"
    has = f"{free} bytes free" if free is not None else "bytes free not known"
    return DiskFullError(
        f"no space left: {needed}, {has} ({reason})",
        where,
        "free space or raise the quota (`taprobe prune` removes old versions), then run again",
    )


def is_disk_full(error: BaseException | None) -> bool:
    """Tell whether an error, or what caused it, says that nothing more can be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if _code_in_text(error) in _FULL or _FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_system_error(error: BaseException) -> bool:
    """Tell whether an error is the operating system's, about a file, whoever reported it.

    Network errors are not: their libraries derive them from `OSError`, mostly without a code.
    """
    if isinstance(error, OSError):
        is_network = isinstance(error, ConnectionError | TimeoutError)
        return error.errno is not None and not is_network
    library = type(error).__module__.split(".")[0]
    return library in _FILE_LIBRARIES and _code_in_text(error) is not None


def _code_in_text(error: BaseException) -> int | None:
    found = _CODE_TEXT.search(str(error))
    return int(found[1]) if found else None


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
