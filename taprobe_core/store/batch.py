"""Many commits of one file each with grouped fsyncs, as they come or in step with their maker.

Turns whole files into artifacts as `Store.commit` does, each locked, flushed and renamed by itself;
but every step is taken for all of them before the next one, so that the disk writes them side by
side and one journal entry of its file system serves them all. What is not plain goes to
`Store.commit` afterwards: a version that exists, a lock that somebody holds, a partition named
twice, a store that is no local folder.

In step, what came together is committed by the call. Ahead, child processes do it (`workers`),
because commits by the hundred a second would keep this process from feeding an accelerator. What
does not belong here: what the files are and where they come from.

Invariants: no version gets its name before its bytes, its manifest, its folder and the entry of its
partition are on the disk; a fault of one commit is no other's. An error of a commit is raised by a
later `put`, or by `flush`; in step, by this one.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from taprobe_core.errors import BusyArtifactError, TaprobeError
from taprobe_core.store.artifacts import Draft, Store
from taprobe_core.store.backend import POINTER
from taprobe_core.store.disk import (
    check_room,
    disk_errors,
    sync_path,
    temporary_name,
    write_bytes,
    write_open,
)
from taprobe_core.store.fingerprint import ArtifactKey, check_key
from taprobe_core.store.integrity import describe_parts, remember_sha256
from taprobe_core.store.local import LocalBackend
from taprobe_core.store.manifest import MANIFEST_NAME, render_manifest
from taprobe_core.store.workers import CommitWorkers, FileCommit

MAX_BATCH = 32
"""Commits under way at once; each holds its lock and three open files."""


def commit_files(store: Store, commits: Iterable[FileCommit]) -> None:
    """Commit artifacts; what exists is left as it is.

    Each is staged when it comes, so that a stream is on its way to the disk before it ends.

    Args:
        store: where to.
        commits: any number; more than `MAX_BATCH` are committed group by group.

    Raises:
        TaprobeError: of the first that could not be committed; the others are.
    """
    faults: list[TaprobeError] = []
    arriving = iter(commits)
    while _commit_group(store, islice(arriving, MAX_BATCH), faults):
        pass
    if faults:
        raise faults[0]


def _commit_group(store: Store, commits: Iterable[FileCommit], faults: list[TaprobeError]) -> bool:
    """Commit some, and tell whether there were any."""
    staged: list[_Staged] = []
    unflushed: list[Path] = []
    later: list[FileCommit] = []
    is_any = False
    with ExitStack() as opened:
        for commit in commits:
            is_any = True
            with _collecting(faults):
                found = _stage(store, commit, unflushed)
                if found is None:
                    later.append(commit)
                else:
                    opened.callback(found.close)
                    staged.append(found)
        for each in staged:
            with _collecting(faults):
                each.flush(unflushed)
        for each in staged:
            with _collecting(faults):
                each.publish()
        for each in staged:
            with _collecting(faults):
                each.settle()
        for each in staged:
            with _collecting(faults):
                each.close()
    for commit in later:
        with _collecting(faults):
            with disk_errors(store.backend.where(*commit.key)):
                _flush_all(unflushed)  # what no version of this group has flushed
            _commit_one(store, commit)
    return is_any


@contextmanager
def _collecting(faults: list[TaprobeError]) -> Iterator[None]:
    try:
        yield
    except TaprobeError as fault:  # raised when the others are done
        faults.append(fault)


def _commit_one(store: Store, commit: FileCommit) -> None:
    store.commit(
        commit.key,
        lambda folder: write_bytes(folder / commit.name, *commit.parts),
        provenance=commit.provenance,
        estimate_bytes=commit.n_bytes,
        code_version=commit.code_version,
        config=commit.config,
    )


def _stage(store: Store, commit: FileCommit, unflushed: list[Path]) -> _Staged | None:
    """Lock a partition and write a version beside it; None where `Store.commit` has to decide."""
    backend, key = store.backend, check_key(commit.key)
    if not isinstance(backend, LocalBackend):
        return None
    draft = Draft(key, commit.code_version, commit.config, commit.provenance, ()).checked()
    with disk_errors(backend.where(*key), commit.n_bytes, backend.free_bytes), ExitStack() as held:
        try:
            held.enter_context(backend.lock_at_once(key.stage, key.partition, unflushed))
        except BusyArtifactError:
            return None
        if backend.sizes(key) is not None:
            return None
        check_room(backend.where(*key), commit.n_bytes, backend.free_bytes)
        found = _Staged(backend, commit)
        held.callback(found.remove)
        found.write(draft, store.next_sequence(key))
        found.held = held.pop_all()
        return found


def _flush_all(unflushed: list[Path]) -> None:
    """Flush folders and take them off the list; one that fails stays on it."""
    while unflushed:
        sync_path(unflushed[0])
        del unflushed[0]


class _Staged:
    """A version that is written but has no name yet, in a partition that this process holds.

    Args:
        backend: keeps it.
        commit: what it is made of.
    """

    def __init__(self, backend: LocalBackend, commit: FileCommit) -> None:
        self.held = ExitStack()
        self._backend = backend
        self._key: ArtifactKey = commit.key
        self._commit = commit
        self._partition = backend.where(commit.key.stage, commit.key.partition)
        self._folder = f"{self._partition}/{temporary_name(commit.key.fingerprint)}"
        self._pointer = f"{self._partition}/{temporary_name(POINTER)}"
        self._descriptors: list[int] = []
        self._sha256 = ""
        self._is_flushed = self._is_published = self._is_current = False

    def write(self, draft: Draft, sequence: int) -> None:
        """Write the file, the manifest and the next pointer, and let the disk begin with them."""
        name = self._commit.name
        os.mkdir(self._folder)  # noqa: PTH102
        self._open(f"{self._folder}/{name}", *self._commit.parts)
        record = describe_parts(name, self._commit.parts, self._folder)
        self._sha256 = record["sha256"]
        rendered = render_manifest(draft.body({name: record}, sequence))
        self._open(f"{self._folder}/{MANIFEST_NAME}", rendered)
        self._open(self._pointer, f"{self._key.fingerprint}\n".encode("ascii"))

    def _open(self, path: str, *parts: bytes | memoryview) -> None:
        self._descriptors.append(write_open(path, *parts))
        if hasattr(os, "posix_fadvise"):
            # On Linux this begins to write out, without waiting; flushed one by one, each file
            # would wait for a journal entry of its own.
            os.posix_fadvise(self._descriptors[-1], 0, 0, os.POSIX_FADV_DONTNEED)

    def flush(self, unflushed: list[Path]) -> None:
        """Wait until everything that the version consists of is on the disk.

        Args:
            unflushed: folders above, in which the batch made others; the first one flushes all, or
                fails and leaves the rest to the next.
        """
        with self._errors():
            while self._descriptors:
                os.fsync(self._descriptors[-1])
                os.close(self._descriptors.pop())
            sync_path(self._folder)
            _flush_all(unflushed)
        self._is_flushed = True

    def publish(self) -> None:
        """Give the version its name, and make it current."""
        if not self._is_flushed:
            return
        with self._errors():
            os.rename(self._folder, f"{self._partition}/{self._key.fingerprint}")  # noqa: PTH104
            self._is_published = True
            os.replace(self._pointer, f"{self._partition}/{POINTER}")  # noqa: PTH105
            self._is_current = True

    def settle(self) -> None:
        """Wait until the names are on the disk."""
        if not self._is_published:
            return
        with self._errors():
            sync_path(self._partition)
            remember_sha256(self._backend.folder(self._key) / self._commit.name, self._sha256)

    def close(self) -> None:
        """Remove what has got no name, and let the partition go."""
        with self._errors():
            self.held.close()

    def remove(self) -> None:
        """Remove what has got no name."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        if not self._is_published:
            shutil.rmtree(self._folder, ignore_errors=True)
        if not self._is_current:
            with suppress(FileNotFoundError):
                os.unlink(self._pointer)  # noqa: PTH108

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with disk_errors(self._partition, self._commit.n_bytes, self._backend.free_bytes):
            yield


_BATCH = 12
"""Commits that a child gets at once: so that the last ones are shared out over the children."""

_AHEAD = 2
"""Calls of `put` for each child whose commits may be under way; bounds the memory."""


class Committer:
    """Commits artifacts of one file each.

    Args:
        store: where to.
        workers: children that commit while `put` returns; None commits in step, and so does a
            store that is no local folder.
    """

    def __init__(self, store: Store, workers: CommitWorkers | None = None) -> None:
        self._store = store
        self._workers = workers
        self._root = store.backend.root if isinstance(store.backend, LocalBackend) else None
        self._pending: deque[list[Future[None]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.flush()

    def put(self, commits: Sequence[FileCommit]) -> None:
        """Commit some artifacts.

        Args:
            commits: their bytes must stay as they are until they are committed.

        Raises:
            TaprobeError: one of these, or of an earlier call, could not be committed.
        """
        if self._workers is not None and self._root is not None:
            starts = range(0, len(commits), _BATCH)
            batches = [commits[at : at + _BATCH] for at in starts]
            self._pending.append([self._workers.submit(self._root, each) for each in batches])
            self._wait(_AHEAD * len(self._workers))
        else:
            commit_files(self._store, commits)

    def flush(self) -> None:
        """Wait for every commit.

        Raises:
            TaprobeError: one could not be committed.
        """
        self._wait(0)

    def _wait(self, n_left: int) -> None:
        while len(self._pending) > n_left:
            for future in self._pending.popleft():
                future.result()
