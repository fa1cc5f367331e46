"""`taprobe ui`: the daemon and the web server, as children that die with their parent.

The web server listens on the loopback address only, behind `guard`; only the address printed here
opens it. Sharing is by SSH tunnel.

Concept: https://docs.dagster.io/deployment/execution/webserver
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from taprobe_core.cli.app import err
from taprobe_dagster.access import TOKEN_VARIABLE, entry_url
from taprobe_dagster.home import prepare_home

WORKSPACE = Path(__file__).resolve().parent.parent / "workspace.yaml"


def serve(port: int, token: str, *, is_read_only: bool = False) -> None:
    """Run web server and daemon until interrupted.

    Args:
        port: port on 127.0.0.1.
        token: that opens the UI.
        is_read_only: the UI shows everything and changes nothing.
    """
    home = prepare_home()
    err.print(f"{entry_url(port, token)}  (DAGSTER_HOME {home}; Ctrl-C stops)")
    # No other user reads an environment, as they do a command line; only the web server needs it.
    bare = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    commands = [
        (["dagster._daemon", "run", "-w", str(WORKSPACE)], bare),
        (_web_command(port, is_read_only), {**bare, TOKEN_VARIABLE: token}),
    ]
    children = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", *command], env=environment, preexec_fn=_die_with_parent
        )
        for command, environment in commands
    ]
    try:
        children[-1].wait()
    finally:
        for child in children:
            child.send_signal(signal.SIGINT)
        for child in children:
            child.wait(timeout=30)


def _web_command(port: int, is_read_only: bool) -> list[str]:
    options = ["--read-only"] if is_read_only else []
    return ["taprobe_dagster.web", str(WORKSPACE), str(port), *options]


def _die_with_parent() -> None:
    """Ask Linux to kill this child when its parent goes, however it goes."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
