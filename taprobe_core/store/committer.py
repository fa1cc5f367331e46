"""Commit files as they come, in step with whoever makes them or while he goes on.

In step, what came together is committed by the call (`batch`). Ahead, child processes do it
(`workers`), because commits by the hundred a second would keep this process from
feeding an accelerator. What does not belong here: what the files are.

The invariant: an error of a commit is raised by a later `put`, or by `flush`; in step, by this one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from taprobe_core.store.artifacts import Store
from taprobe_core.store.batch import commit_files
from taprobe_core.store.local import LocalBackend
from taprobe_core.store.workers import CommitWorkers, FileCommit

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
