"""Commits in other processes, so that thousands of them do not hold up the one that makes the data.

A commit is mostly waiting for the disk and hashing, but the rest of it holds the interpreter, and a
process that feeds an accelerator has none to spare. Each worker is a child that gets whole files
through a pipe and calls `Store.commit` for them, several at once. What does not belong here: what
the files mean.

The invariant: a commit is what `Store.commit` makes it, done by another process; a worker ends with
the process that started it, and what it had not committed is not there.

A message: 8 bytes length (little endian), that many bytes of JSON (the store's folder and a list of
commits, each with key, file name, size and manifest fields), then the files' bytes one after the
other. The answer: one line of JSON, null or the error's class, what, where and fix.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from taprobe_core import errors
from taprobe_core.store.fingerprint import ArtifactKey

LENGTH = struct.Struct("<Q")

N_WORKERS = 8
"""Children that keep up with one accelerator: all together some 500 commits a second."""


def workers_for(n_accelerators: int) -> int:
    """Return how many children keep up with so many accelerators, on half of the cores at most."""
    return max(1, min(N_WORKERS * n_accelerators, (os.cpu_count() or 1) // 2))


@dataclass(frozen=True, eq=False)
class FileCommit:
    """One artifact of one file.

    Attributes:
        key: the artifact's key.
        name: the file's name.
        parts: its bytes, in order.
        provenance: what the manifest says beside the key.
        code_version: version of the stage's code.
        config: slice of the study.
    """

    key: ArtifactKey
    name: str
    parts: Sequence[bytes | memoryview]
    provenance: Mapping[str, Any]
    code_version: str
    config: Mapping[str, Any]

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return sum(memoryview(part).nbytes for part in self.parts)

    def header(self) -> dict[str, Any]:
        """What a worker gets to know of it, as JSON values."""
        return {
            "key": [self.key.stage, list(self.key.partition), self.key.fingerprint],
            "name": self.name,
            "n_bytes": self.n_bytes,
            "provenance": self.provenance,
            "code_version": self.code_version,
            "config": self.config,
        }


class CommitWorkers:
    """Child processes that commit into stores of local folders.

    Args:
        n_workers: children; started at once, since they take seconds to begin.
    """

    def __init__(self, n_workers: int = N_WORKERS) -> None:
        self._workers = [_Worker() for _ in range(n_workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(n_workers, thread_name_prefix="commit-worker")

    def __len__(self) -> int:
        """Children."""
        return len(self._workers)

    def close(self) -> None:
        """Let the children end, and wait for them; what was not begun is not committed."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def submit(self, root: Path, commits: Sequence[FileCommit]) -> Future[None]:
        """Commit some artifacts in one worker; the future fails with the first error.

        Args:
            root: folder of the store.
            commits: their bytes must stay as they are until the future is done.
        """
        return self._threads.submit(self._commit, root, commits)

    def _commit(self, root: Path, commits: Sequence[FileCommit]) -> None:
        worker = self._idle.get()
        try:
            worker.commit(root, commits)
        finally:
            self._idle.put(worker)


class _Worker:
    def __init__(self) -> None:
        # The child imports what its parent does, wherever that came from.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "taprobe_core.store.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def commit(self, root: Path, commits: Sequence[FileCommit]) -> None:
        about = {"root": str(root), "commits": [commit.header() for commit in commits]}
        header = json.dumps(about).encode()
        try:
            stdin, stdout = _pipe(self._process.stdin), _pipe(self._process.stdout)
            stdin.write(LENGTH.pack(len(header)) + header)
            for commit in commits:
                for part in commit.parts:
                    stdin.write(part)
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            raise errors.ArtifactError(
                f"a process that commits ended (exit status {self._process.poll()})",
                str(commits[0].key),
                "see its message above, then run again: what was committed stays",
            )
        reported = json.loads(answer)
        if reported is not None:
            raise _error(reported)

    def close(self) -> None:
        """Let the child end and wait for it."""
        with suppress(BrokenPipeError):  # ended already, and said so when it was asked
            _pipe(self._process.stdin).close()
        self._process.wait()
        _pipe(self._process.stdout).close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise AssertionError("the child was started with pipes")
    return pipe


def _error(reported: Mapping[str, Any]) -> errors.TaprobeError:
    kind = getattr(errors, reported["class"], errors.ArtifactError)
    error: errors.TaprobeError = kind(reported["what"], reported["where"], reported["fix"])
    return error
