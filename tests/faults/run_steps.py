"""Runs a study in forks of a process that imported everything; each fork may be killed.

Reads lines of JSON `{"study", "data", "log", "kill"}` and answers each with the fork's exit code.
The fork runs every stage over every cell, without Dagster. A line of the log is the key of an
artifact whose writing has begun. `kill` is [n, moment]: SIGKILL at the n-th such artifact, either
`in` the middle of its writing or just `after` it has its name; null lets the fork finish. Artifacts
are committed by several threads, so it is the artifact that is counted, not the moment.
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


def arm(log: str, kill: tuple[int, str] | None) -> None:
    begun = itertools.count(1)
    stop_at, moment = kill or (0, "")
    last: Any = None
    real_commit, real_publish = Store.commit, LocalBackend.publish

    def commit(self: Store, key: Any, write: Callable[[Path], None], **more: Any) -> Any:
        def noting(folder: Path) -> None:
            nonlocal last
            n = next(begun)
            if n == stop_at:
                last = key
            with Path(log).open("a") as file:
                file.write(f"{key}\n")
            write(folder)
            if n == stop_at and moment == "in":
                die()

        return real_commit(self, key, noting, **more)

    def publish(self: LocalBackend, key: Any, folder: Path) -> None:
        real_publish(self, key, folder)
        if key == last and moment == "after":
            die()

    Store.commit = commit  # type: ignore[method-assign]
    LocalBackend.publish = publish  # type: ignore[method-assign]


def run(study: str, data: str, log: str, kill: tuple[int, str] | None) -> None:
    arm(log, kill)
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
