"""Runs the extraction of a study in forks of a process that has imported everything.

`extraction_steps.py <study>` reads lines of JSON `{"data", "log"}`. It answers each with the fork's
process id, and with its exit code once it has ended. A line of the log is a forward pass that
begins: the hash of its tokens.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from taprobe_core.activations import passes
from taprobe_core.checkpoints.tokenizer import vocabulary_size
from taprobe_core.pipeline import cells_of, open_plan, run_stage
from taprobe_core.study import load_study


def note_passes(log: str) -> None:
    real_init = passes.QueuedPack.__init__

    def init(self: Any, model: Any, tasks: Any, options: Any) -> None:
        with Path(log).open("a") as file:
            texts = [list(task.token_ids) for task in tasks]
            file.write(hashlib.sha256(repr(texts).encode()).hexdigest())
            file.write("\n")
        real_init(self, model, tasks, options)

    passes.QueuedPack.__init__ = init  # type: ignore[method-assign]


def run(study: str, data: str, log: str) -> None:
    note_passes(log)
    plan = open_plan(study, data)
    for stage in ("rollouts", "spans", "activations"):
        for _ in run_stage(plan, stage, cells_of(plan.study, stage)):
            pass


def answer(what: int) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def preload(study: str) -> None:
    """Import what the stages import late, and read the vocabularies, so that forks need not."""
    for name in ("llama", "qwen2"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    for model in load_study(study).models.values():
        vocabulary_size(model)


def main() -> None:
    warnings.simplefilter("ignore")
    study = sys.argv[1]
    preload(study)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                run(study, **json.loads(line))
                code = 0
            finally:
                os._exit(code)
        answer(pid)
        answer(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main()
