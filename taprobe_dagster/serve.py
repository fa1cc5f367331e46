"""`taprobe ui`: the daemon and the web server, as children that are watched and end together.

A child that dies is started again a few times; while both live, runs whose process is gone are
failed. The web server listens on the loopback address only, behind `guard`; only the address
printed here opens it. Sharing is by SSH tunnel.

Concept: https://docs.dagster.io/deployment/execution/webserver
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.markup import escape

from taprobe_core.cli.app import EXIT_INTERRUPTED, err
from taprobe_core.errors import ConfigError, TaprobeError
from taprobe_dagster.access import TOKEN_VARIABLE, entry_url
from taprobe_dagster.home import open_instance
from taprobe_dagster.recovery import watched

WORKSPACE = Path(__file__).resolve().parent.parent / "workspace.yaml"

MAX_RESTARTS = 3
"""Times that one child is started again within `RESTARTS_S`; then the command ends."""

RESTARTS_S = 600
POLL_S = 0.5
GRACE_S = 8
"""How long a child and what it started may take to end, before they are killed."""


def serve(port: int, token: str, *, is_read_only: bool = False) -> None:
    """Run web server and daemon until interrupted.

    Args:
        port: port on 127.0.0.1.
        token: that opens the UI.
        is_read_only: the UI shows everything and changes nothing.

    Raises:
        ConfigError: the port is taken or cannot be had.
        HomeError: `DAGSTER_HOME` cannot be used.
        TaprobeError: a child dies again and again.
        SystemExit: interrupted, with 130.
    """
    check_port(port)
    commands = {
        "daemon": ["-m", "dagster._daemon", "run", "-w", str(WORKSPACE)],
        "web server": _web_command(port, is_read_only),
    }
    with open_instance() as instance, watched(instance, err.print):
        home = os.environ["DAGSTER_HOME"]
        err.print(f"{entry_url(port, token)}  (DAGSTER_HOME {escape(home)}; Ctrl-C stops)")
        # No other user reads an environment, as they do a command line.
        watch_children(commands, {"web server": {TOKEN_VARIABLE: token}})
    raise SystemExit(EXIT_INTERRUPTED)


def check_port(port: int) -> None:
    """Refuse a port that the web server will not get, before anything is started.

    Raises:
        ConfigError: the port is taken or cannot be had.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no such port"
            raise ConfigError(
                f"port {port} cannot be had: {reason}",
                f"127.0.0.1:{port}",
                "end what listens there (`ss -ltnp` shows it), or choose another --port",
            ) from error


def watch_children(
    commands: Mapping[str, Sequence[str]],
    secrets: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Start Python children and keep them running until this process is told to stop.

    Args:
        commands: name of a child -> arguments of its Python.
        secrets: name of a child -> what its environment has and that of no other child.

    Raises:
        TaprobeError: a child has died more often than it is started again.
    """
    starts: dict[str, list[float]] = {name: [] for name in commands}
    own = secrets or {}
    kept = {variable for each in own.values() for variable in each}
    shared = {name: value for name, value in os.environ.items() if name not in kept}

    def start(name: str) -> subprocess.Popen[bytes]:
        return _start(commands[name], {**shared, **own.get(name, {})})

    with _stop_signals() as is_stopped:
        children: dict[str, subprocess.Popen[bytes]] = {}
        started: list[subprocess.Popen[bytes]] = []
        try:
            for name in commands:
                started.append(start(name))
                children[name] = started[-1]
            while not is_stopped(POLL_S):
                for name, child in children.items():
                    if child.poll() is None:
                        continue
                    how = _how(child.returncode)
                    now = time.monotonic()
                    starts[name] = [each for each in starts[name] if now - each < RESTARTS_S]
                    if len(starts[name]) >= MAX_RESTARTS:
                        raise TaprobeError(
                            f"the {name} has ended {MAX_RESTARTS + 1} times, at last {how}",
                            "taprobe ui",
                            "see what it said above, mend it, and start `taprobe ui` again",
                        )
                    err.print(f"the {name} has ended ({how}) and is started again")
                    starts[name].append(now)
                    started.append(start(name))
                    children[name] = started[-1]
        finally:
            _end(started)


def _start(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in the terminal reaches this process alone, which then ends the
    # child and all that the child has started.
    return subprocess.Popen(  # noqa: S603
        [sys.executable, *arguments],
        env=environment,
        preexec_fn=_die_with_parent,
        start_new_session=True,
    )


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


@contextmanager
def _stop_signals() -> Iterator[Callable[[float], bool]]:
    """Note the signals that end a command; yields "wait so long for one".

    Handlers are set anew because a library may have set one that lets a system call go on.
    """
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, lambda *_: stop.set()) for each in signals}
    try:
        yield stop.wait
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End children with everything that they have started: asked first, then killed."""
    _signal_all(children, signal.SIGINT)
    deadline = time.monotonic() + GRACE_S
    while _signal_all(children, 0) and time.monotonic() < deadline:
        time.sleep(0.1)
    _signal_all(children, signal.SIGKILL)
    for child in children:
        child.wait()


def _signal_all(children: Sequence[subprocess.Popen[bytes]], number: int) -> bool:
    """Send a signal to the sessions of children; whether anybody was there."""
    is_any = False
    for child in children:
        child.poll()  # takes leave of the child itself, which would else count as there
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            continue
        is_any = True
    return is_any


def _web_command(port: int, is_read_only: bool) -> list[str]:
    options = ["--read-only"] if is_read_only else []
    return ["-m", "taprobe_dagster.web", str(WORKSPACE), str(port), *options]


def _die_with_parent() -> None:
    """Ask Linux to kill this child when its parent goes, however it goes."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
