"""Stops a store operation before its n-th step, in a fork of a process that imported everything.

Reads lines `<root> <scenario> <fault> <n>` and answers each with one line of JSON: what became of
the fork, and the name of the step at which it was stopped. A step is any change of the disk:
making, renaming or removing an entry, opening a file for writing, and both sides of an fsync. They
are seen from outside the store, through the interpreter's audit events.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from taprobe_core.errors import TaprobeError
from taprobe_core.store import ArtifactKey, Store, fingerprint, write_json

VERSIONS = [fingerprint("labels", str(n), {}, []) for n in range(4)]
OLD, NEW, *_ = KEYS = [ArtifactKey("labels", ("m@L16", "7"), version) for version in VERSIONS]
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

Step = Callable[[str], None]


def commit(root: Path, key: ArtifactKey, step: Step = lambda name: None) -> None:
    def write(folder: Path) -> None:
        with (folder / "big.bin").open("wb") as file:
            file.write(key.fingerprint.encode() * 50)
            file.flush()
            step("half a file")
            file.write(key.fingerprint.encode() * 50)
        write_json(folder / "v.json", key.fingerprint)

    Store(root, lock_timeout_s=5).commit(key, write, provenance={"version": key.fingerprint})


def prune(root: Path, step: Step) -> None:
    Store(root).prune(1)


def discard(root: Path, step: Step) -> None:
    Store(root).discard(NEW)


SCENARIOS: dict[str, Callable[[Path, Step], None]] = {
    "fresh": lambda root, step: commit(root, NEW, step),
    "next": lambda root, step: commit(root, NEW, step),
    "repair": lambda root, step: commit(root, NEW, step),
    "adopt": lambda root, step: commit(root, OLD, step),
    "prune": prune,
    "discard": discard,
}


def prepare(root: Path, scenario: str) -> None:
    """Bring a new store into the state that the scenario starts from."""
    root.mkdir()
    for key in {"fresh": [], "next": [OLD], "prune": KEYS}.get(scenario, [OLD, NEW]):
        commit(root, key)
    if scenario == "repair":
        (root / str(NEW) / "v.json").write_bytes(b"")


class Stopper:
    """Counts steps and acts before the n-th."""

    def __init__(self, act: Callable[[str], None], n: int) -> None:
        self.left = n
        self.act = act

    def step(self, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.act(re.sub(r"-\d+-[0-9a-f]{8}|[0-9a-f]{20}", "*", name))

    def audit(self, event: str, args: tuple[object, ...]) -> None:
        is_open = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if event in CHANGES or is_open:
            self.step(f"{event} {os.path.basename(str(args[0]))}")  # noqa: PTH119

    def install(self) -> None:
        fsync = os.fsync

        def stepping_fsync(descriptor: int) -> None:
            name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115, PTH119
            self.step(f"before fsync {name}")
            fsync(descriptor)
            self.step(f"after fsync {name}")

        os.fsync = stepping_fsync
        sys.addaudithook(self.audit)


def run_fork(root: Path, scenario: str, fault: str, n: int, answers: int) -> None:
    def stop(name: str) -> None:
        os.write(answers, name.encode())
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(int(fault), os.strerror(int(fault)))

    stopper = Stopper(stop, n)
    stopper.install()
    try:
        SCENARIOS[scenario](root, stopper.step)
    except TaprobeError as error:
        os.write(answers, f"\n{type(error).__name__}\n{error}".encode())
    os._exit(0)


def ask(root: Path, scenario: str, fault: str, n: int) -> dict[str, object]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run_fork(root, scenario, fault, n, write)
        finally:
            os._exit(70)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(read, "rb") as answer:
        step, _, rest = answer.read().decode().partition("\n")
    error, _, message = rest.partition("\n")
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "step": step, "error": error, "message": message}


def main() -> None:
    for line in sys.stdin:
        root, scenario, fault, n = line.split()
        if not Path(root).exists():
            prepare(Path(root), scenario)
        sys.stdout.write(json.dumps(ask(Path(root), scenario, fault, int(n))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
