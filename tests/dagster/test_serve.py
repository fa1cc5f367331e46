"""The children of `taprobe ui`: watched, started again, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taprobe_core.errors import ConfigError, TaprobeError
from taprobe_dagster import serve
from taprobe_dagster.serve import MAX_RESTARTS, check_port, watch_children

# Writes its own number and that of a child of its own, which ignores what it is asked.
FAMILY = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"])
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")
time.sleep(60)
"""


def _numbers(path: Path) -> list[int]:
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Act from another thread as soon as a condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_an_interrupt_of_the_command_alone_ends_all_that_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "GRACE_S", 1)
    path = tmp_path / "numbers"
    before = signal.getsignal(signal.SIGINT)
    stop = _when(lambda: len(_numbers(path)) == 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    watch_children({"family": ["-c", FAMILY, str(path)]})
    stop.join()
    assert [pid for pid in _numbers(path) if _is_running(pid)] == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_killed_child_is_said_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "GRACE_S", 1)
    path = tmp_path / "numbers"
    kill = _when(
        lambda: len(_numbers(path)) == 2, lambda: os.kill(_numbers(path)[0], signal.SIGKILL)
    )
    stop = _when(lambda: len(_numbers(path)) == 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    watch_children({"daemon": ["-c", FAMILY, str(path)]})
    kill.join()
    stop.join()
    assert "the daemon has ended (killed by SIGKILL) and is started again" in (
        capsys.readouterr().err
    )
    assert [pid for pid in _numbers(path) if _is_running(pid)] == []


def test_a_child_that_dies_again_and_again_ends_the_command_and_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "GRACE_S", 1)
    monkeypatch.setattr(serve, "POLL_S", 0.05)
    path = tmp_path / "numbers"
    with pytest.raises(TaprobeError, match=f"ended {MAX_RESTARTS + 1} times, at last with exit"):
        watch_children({"daemon": ["-c", FAMILY, str(path)], "web": ["-c", "raise SystemExit(3)"]})
    assert [pid for pid in _numbers(path) if _is_running(pid)] == []


def test_a_port_in_use_is_refused_before_anything_is_started(
    taprobe: Callable[..., Any], built: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        said = taprobe("ui", built.study, "--port", other.getsockname()[1])
    assert said.code == 2
    assert "Address already in use" in said.err
    assert "another --port" in said.err.split("Fix: ")[1]
    assert not (tmp_path / "dagster").exists()


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such port"):
        check_port(70000)
