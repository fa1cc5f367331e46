"""The child of `workers`: reads commits from its standard input until that ends.

Started as `python -m taprobe_core.store.worker`. What does not belong here: the format of the
messages, which `workers` states.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from taprobe_core.errors import TaprobeError
from taprobe_core.store.artifacts import Store
from taprobe_core.store.disk import write_bytes
from taprobe_core.store.fingerprint import ArtifactKey
from taprobe_core.store.workers import LENGTH

_THREADS = 8
"""Commits at once: each waits for the disk most of its time."""


def main() -> None:
    """Commit what comes in, and answer each message with one line."""
    # An interrupt is for the parent; the child ends when its input does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    with ThreadPoolExecutor(_THREADS) as pool:
        while len(head := source.read(LENGTH.size)) == LENGTH.size:
            try:
                found = _serve(pool, source, head)
                answers.write(json.dumps(found).encode() + b"\n")
                answers.flush()
            except (EOFError, BrokenPipeError):
                return  # the parent is gone, and with it whoever would read a message


def _serve(
    pool: ThreadPoolExecutor, source: IO[bytes], head: bytes
) -> dict[str, str | None] | None:
    message = json.loads(bytes(_read(source, LENGTH.unpack(head)[0])))
    store = Store(Path(message["root"]))
    # Begun as they arrive: the first is on its way to the disk while the last is still in the pipe.
    commits = [
        pool.submit(_commit, store, header, _read(source, header["n_bytes"]))
        for header in message["commits"]
    ]
    found: dict[str, str | None] | None = None
    for commit in commits:
        error = commit.exception()
        if error is not None and found is None:
            found = _told(error)
    return found


def _commit(store: Store, header: Mapping[str, Any], content: memoryview) -> None:
    stage, partition, fingerprint = header["key"]

    def write(folder: Path) -> None:
        write_bytes(folder / header["name"], content)

    store.commit(
        ArtifactKey(stage, tuple(partition), fingerprint),
        write,
        provenance=header["provenance"],
        estimate_bytes=header["n_bytes"],
        code_version=header["code_version"],
        config=header["config"],
    )


def _read(source: IO[bytes], n_bytes: int) -> memoryview:
    content = memoryview(bytearray(n_bytes))
    filled = 0
    while filled < n_bytes:
        got = source.readinto(content[filled:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError("the parent ended within a message")
        filled += got
    return content


def _told(error: BaseException) -> dict[str, str | None]:
    if isinstance(error, TaprobeError):
        return {
            "class": type(error).__name__,
            "what": error.what,
            "where": error.where,
            "fix": error.fix,
        }
    return {
        "class": "ArtifactError",
        "what": f"the artifact could not be written: {type(error).__name__}: {error}",
        "where": None,
        "fix": "check the store's folder and its disk, then run again",
    }


if __name__ == "__main__":
    main()
