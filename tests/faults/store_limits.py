"""Commits under a limit of the operating system; prints what became of each, as one line of JSON.

`store_limits.py size <root>`: no file may pass 20,000 bytes.
`store_limits.py readonly <root>`: the folder may not be written; root gives up its rights first.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
from safetensors.numpy import save_file

from taprobe_core.errors import TaprobeError
from taprobe_core.store import ArtifactKey, Store, fingerprint, write_json, write_table

NUMBERS = np.random.default_rng(0).random(50_000)


def write_bytes(folder: Path) -> None:
    (folder / "big.bin").write_bytes(NUMBERS.tobytes())


WRITERS: dict[str, Callable[[Path], None]] = {
    "bytes": write_bytes,
    "json": lambda folder: write_json(folder / "big.json", NUMBERS.tolist()),
    "table": lambda folder: write_table(folder / "t.parquet", pl.DataFrame({"x": NUMBERS})),
    "tensors": lambda folder: save_file({"x": NUMBERS}, folder / "t.safetensors"),
    "small": lambda folder: write_json(folder / "v.json", 1),
}


def limit(kind: str) -> None:
    if kind == "size":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    elif os.geteuid() == 0:
        os.setuid(65_534)


def outcome(store: Store, name: str) -> list[str]:
    key = ArtifactKey("labels", ("p",), fingerprint("labels", name, {}, []))
    calls: list[Path] = []

    def write(folder: Path) -> None:
        calls.append(folder)
        WRITERS[name](folder)

    try:
        store.commit(key, write, provenance={}, estimate_bytes=400_000)
    except TaprobeError as error:
        return [type(error).__name__, str(error), str(len(calls))]
    return ["ok", "", str(len(calls))]


def main() -> None:
    kind, root = sys.argv[1:]
    limit(kind)
    store = Store(Path(root))
    sys.stdout.write(json.dumps({name: outcome(store, name) for name in WRITERS}))


if __name__ == "__main__":
    main()
