"""A second process for tests of concurrency; prints one line of JSON when it has something to say.

`store_writer.py commit <root> <seconds> <log>`: commits one artifact, taking that long to write it.
`store_writer.py versions <root> <n>`: commits n versions of one partition, pruning as it goes.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from taprobe_core.store import ArtifactKey, Store, fingerprint, write_json


def key_of(n: int) -> ArtifactKey:
    return ArtifactKey("labels", ("p",), fingerprint("labels", str(n), {}, []))


def say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def commit(root: str, seconds: str, log: str) -> None:
    def write(folder: Path) -> None:
        with Path(log).open("a") as file:
            file.write("computed\n")
        say(writing=str(folder))
        write_json(folder / "v.json", 7)
        time.sleep(float(seconds))

    say(ready=True, has_torch="torch" in sys.modules)
    sys.stdin.readline()
    artifact = Store(Path(root)).commit(key_of(0), write, provenance={})
    say(value=artifact.read_json("v.json"))


def versions(root: str, n: str) -> None:
    store = Store(Path(root))
    say(ready=True, has_torch="torch" in sys.modules)
    sys.stdin.readline()
    for number in range(int(n)):

        def write(folder: Path, number: int = number) -> None:
            for name in ("a.json", "b.json"):
                write_json(folder / name, {"n": number, "pad": [number] * 500})

        store.commit(key_of(number), write, provenance={"n": number})
        if number % 10 == 9:
            store.prune(3)
    say(done=True)


if __name__ == "__main__":
    # A shell may have started the tests in the background, where the signal is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    {"commit": commit, "versions": versions}[sys.argv[1]](*sys.argv[2:])
