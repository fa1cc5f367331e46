"""Runs a study in forks of a process that imported everything; each fork may be killed.

Reads lines of JSON `{"study", "data", "log", "kill"}` and answers each with the fork's exit code.
The fork runs every stage over every cell, without Dagster. A line of the log is the key of an
artifact whose writing has begun. `kill` is [n, moment]: SIGKILL at the n-th such artifact, either
`in` the middle of its writing or just `after` it has its name; null lets the fork finish.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taprobe_core.pipeline import cells_of, open_plan, run_stage, stages_of
from taprobe_core.store import LocalBackend, Store


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Notes every artifact whose files begin to be written, and dies at the one it is told to.

    Args:
        log: gets a line for each.
        kill: number of the artifact, and whether to die `in` its writing or `after` its naming.
    """

    def __init__(self, log: str, kill: tuple[int, str] | None) -> None:
        self.log = Path(log)
        self.begun = itertools.count(1)
        self.stop_at, self.moment = kill or (0, "")
        self.last: Any = None

    def write(self, key: Any, write: Callable[[], None]) -> None:
        n = next(self.begun)
        if n == self.stop_at:
            self.last = key
        with self.log.open("a") as file:
            file.write(f"{key}\n")
        write()
        if n == self.stop_at and self.moment == "in":
            die()

    def name(self, key: Any, name: Callable[[], None]) -> None:
        name()
        if key == self.last and self.moment == "after":
            die()

    def arm_store(self) -> None:
        """Watch commits."""
        real_commit, real_publish = Store.commit, LocalBackend.publish

        def commit(store: Store, key: Any, write: Callable[[Path], None], **more: Any) -> Any:
            def noting(folder: Path) -> None:
                self.write(key, lambda: write(folder))

            # What checks find is a store of its own, which is made anew where it is lost.
            is_watched = store.backend.root.name == "artifacts"
            return real_commit(store, key, noting if is_watched else write, **more)

        def publish(backend: LocalBackend, key: Any, folder: Path) -> None:
            self.name(key, lambda: real_publish(backend, key, folder))

        Store.commit = commit  # type: ignore[method-assign]
        LocalBackend.publish = publish  # type: ignore[method-assign]


def run(study: str, data: str, log: str, kill: tuple[int, str] | None) -> None:
    killer = Killer(log, kill)
    killer.arm_store()
    plan = open_plan(study, data)
    for stage in stages_of(plan.study):
        for _ in run_stage(plan, stage, cells_of(plan.study, stage)):
            pass


def preload() -> None:
    """Import what the stages import late, so that the forks need not."""
    for name in ("matplotlib.figure", "sklearn.linear_model", "sklearn.feature_extraction.text"):
        importlib.import_module(name)
    importlib.import_module("transformers.models.llama.modeling_llama")


def main() -> None:
    warnings.simplefilter("ignore")
    preload()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                run(**json.loads(line))
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sys.stdout.write(json.dumps(code) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
