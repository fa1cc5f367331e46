"""`taprobe ui`: the daemon and the web server, as children that die with their parent.

The web server listens on the loopback address only, behind `guard`. Sharing is by SSH tunnel.

Concept: https://docs.dagster.io/deployment/execution/webserver
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

from taprobe_core.cli.app import err
from taprobe_dagster.home import prepare_home

WORKSPACE = Path(__file__).resolve().parent.parent / "workspace.yaml"


def serve(port: int) -> None:
    """Run web server and daemon until interrupted.

    Args:
        port: port on 127.0.0.1.
    """
    home = prepare_home()
    err.print(f"http://127.0.0.1:{port}  (DAGSTER_HOME {home}; Ctrl-C stops)")
    commands = [
        ["dagster._daemon", "run", "-w", str(WORKSPACE)],
        ["taprobe_dagster.guard", str(WORKSPACE), str(port)],
    ]
    children = [
        subprocess.Popen([sys.executable, "-m", *command], preexec_fn=_die_with_parent)  # noqa: S603
        for command in commands
    ]
    try:
        children[-1].wait()
    finally:
        for child in children:
            child.send_signal(signal.SIGINT)
        for child in children:
            child.wait(timeout=30)


def _die_with_parent() -> None:
    """Ask Linux to kill this child when its parent goes, however it goes."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
