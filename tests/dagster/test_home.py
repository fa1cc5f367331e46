"""Dagster's folder: made once by whoever comes first, and every fault of it told with its cure."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from sqlalchemy.exc import OperationalError

from taprobe_core.errors import ConfigError, DataError, HomeError
from taprobe_core.pipeline import data_root
from taprobe_dagster import home as home_module
from taprobe_dagster.home import open_instance, prepare_home
from taprobe_dagster.home_faults import DATABASES, answered

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with its databases, to be copied."""
    folder = tmp_path_factory.mktemp("prepared") / "dagster"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(folder))
        return prepare_home()


@pytest.fixture
def home(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared home of one's own."""
    folder = tmp_path / "dagster"
    shutil.copytree(prepared, folder)
    monkeypatch.setenv("DAGSTER_HOME", str(folder))
    return folder


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that is not there yet."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "new" / "dagster"))
    return tmp_path / "new" / "dagster"


def _prepare(barrier: Any) -> None:
    barrier.wait(30)
    prepare_home()


def _heads(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM alembic_version").fetchone()[0])


def test_four_processes_at_once_make_one_home(fresh_home: Path) -> None:
    barrier = FORK.Barrier(4)
    processes = [FORK.Process(target=_prepare, args=(barrier,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert [_heads(fresh_home / name) for name in DATABASES] == [1, 1, 1]


def test_the_pool_has_its_limit_before_the_first_run(home: Path) -> None:
    with open_instance() as instance:
        info = instance.event_log_storage.get_concurrency_info("gpu")
        assert (info.slot_count, info.active_slot_count) == (1, 0)
        assert instance.get_runs_count() == 0
        claim = instance.event_log_storage.claim_concurrency_slot
        assert claim("gpu", "one", "step").is_claimed
        assert not claim("gpu", "two", "step").is_claimed


def test_a_limit_that_somebody_has_set_stays(home: Path) -> None:
    with open_instance() as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 3)
    with open_instance() as instance:
        assert instance.event_log_storage.get_concurrency_info("gpu").slot_count == 3


def test_settings_of_an_earlier_version_are_replaced_and_own_ones_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = home / "dagster.yaml"
    shipped = settings.read_text()
    settings.write_text("telemetry: {enabled: false}\n")
    prepare_home()
    assert settings.read_text() == "telemetry: {enabled: false}\n"
    digest = home_module.hashlib.sha256(settings.read_bytes()).hexdigest()
    monkeypatch.setattr(home_module, "_SHIPPED_BEFORE", {digest})
    prepare_home()
    assert settings.read_text() == shipped


def _two_heads(home: Path) -> Path:
    path = home / "schedules" / "schedules.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO alembic_version VALUES ('5771160a95ad')")
    return path


def _damaged(home: Path) -> Path:
    path = home / "history" / "runs" / "index.db"
    path.write_bytes(b"not a database, whatever its name says" * 300)
    return path


def _folder_for_a_file(home: Path) -> Path:
    path = home / "history" / "runs.db"
    path.unlink()
    path.mkdir()
    return path


def _unknown_setting(home: Path) -> Path:
    (home / "dagster.yaml").write_text("run_monitorin: {enabled: true}\n")
    return home / "dagster.yaml"


def _no_yaml(home: Path) -> Path:
    (home / "dagster.yaml").write_text("a: [1, 2\n")
    return home / "dagster.yaml"


def _a_list(home: Path) -> Path:
    (home / "dagster.yaml").write_text("- telemetry\n")
    return home / "dagster.yaml"


def _raw_bytes(home: Path) -> Path:
    (home / "dagster.yaml").write_bytes(b"\xff\xfe\x00")
    return home / "dagster.yaml"


def _unknown_module(home: Path) -> Path:
    (home / "dagster.yaml").write_text("run_launcher: {module: no.such, class: Launcher}\n")
    return home / "dagster.yaml"


def _settings_folder(home: Path) -> Path:
    (home / "dagster.yaml").unlink()
    (home / "dagster.yaml").mkdir()
    return home / "dagster.yaml"


def _file_for_the_folder(home: Path) -> Path:
    shutil.rmtree(home)
    home.write_text("a file")
    return home


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        (_two_heads, "delete the folder"),
        (_damaged, "delete the folder"),
        (_folder_for_a_file, "delete the folder"),
        (_unknown_setting, "correct the file"),
        (_no_yaml, "correct the file"),
        (_a_list, "correct the file"),
        (_raw_bytes, "correct the file"),
        (_unknown_module, "correct the file"),
        (_settings_folder, "delete"),
        (_file_for_the_folder, "set DAGSTER_HOME"),
    ],
)
def test_a_fault_is_named_with_its_file_and_its_cure(
    home: Path, fault: Callable[[Path], Path], cure: str
) -> None:
    path = fault(home)
    with pytest.raises(HomeError) as caught, open_instance() as instance:
        instance.get_runs()
    assert caught.value.where == str(path)
    assert cure in str(caught.value.fix)


def test_a_broken_home_is_two_lines_and_exit_2(taprobe: Callable[..., Any], built: Any) -> None:
    taprobe("run", built.study, "--select", "rollouts")
    path = _two_heads(Path(os.environ["DAGSTER_HOME"]))
    said = taprobe("run", built.study, "--select", "rollouts")
    assert said.code == 2
    assert "Traceback" not in said.err
    assert f"2 versions of its schema, as two processes leave that make it at once) in {path}" in (
        " ".join(said.err.split())
    )
    shutil.rmtree(os.environ["DAGSTER_HOME"])
    assert taprobe("run", built.study, "--select", "rollouts").code == 0


def test_a_busy_database_is_waited_for(home: Path) -> None:
    holder = sqlite3.connect(home / "history" / "runs.db", check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    threading.Timer(7, lambda: (holder.rollback(), holder.close())).start()
    begun = time.monotonic()
    with open_instance() as instance:
        instance.add_run(dg.DagsterRun(job_name="j", run_id="r"))
    assert time.monotonic() - begun > 5
    with open_instance() as instance:
        assert instance.get_run_by_id("r") is not None


def test_a_database_that_stays_locked_says_so(home: Path) -> None:
    with pytest.raises(HomeError, match="stayed locked by another process"), answered(home):
        raise OperationalError("UPDATE runs", {}, sqlite3.OperationalError("database is locked"))


def _fill(limit: int) -> None:
    """Add runs to an opened home while no file may grow beyond a limit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_instance() as instance:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            for n in range(200):
                instance.add_run(dg.DagsterRun(job_name="j" * 1000, run_id=f"run-{n}"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_room_in_the_home_is_told_and_not_a_traceback(home: Path) -> None:
    with pytest.raises(HomeError) as caught:
        _fill(4096)
    assert caught.value.where == str(home)
    assert "free some space" in str(caught.value.fix)


def test_what_is_not_of_the_home_passes_unchanged(home: Path) -> None:
    for error in (
        ValueError("a defect"),
        DataError("a fault of the study"),
        FileNotFoundError(2, "No such file", "/elsewhere/file"),
        dg.DagsterInvariantViolationError("of a run"),
    ):
        with pytest.raises(type(error)) as caught, answered(home):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("/data/" + "x" * 256, "256 bytes, and 255 are allowed"),
        ("~nosuchuser/data", "nobody has this home folder"),
        ("/data/" + os.fsdecode(b"\xff\xfe"), "not UTF-8"),
    ],
)
def test_a_path_that_no_folder_can_have_is_refused(
    named: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAPROBE_DATA", named)
    with pytest.raises(ConfigError, match=found) as caught:
        data_root()
    assert str(caught.value).isascii()
    monkeypatch.setenv("DAGSTER_HOME", named)
    with pytest.raises(ConfigError, match=found):
        prepare_home()


def test_a_home_too_deep_for_sqlite_is_refused_by_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / ("x" * 200) / ("y" * 200) / ("z" * 100)))
    with pytest.raises(HomeError, match="too many for SQLite"):
        prepare_home()


def test_dagster_commands_work_in_a_checkout_where_no_home_is_set(tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
    said = subprocess.run(
        [Path(sys.executable).with_name("dagster"), "definitions", "validate"],
        cwd=Path(__file__).resolve().parents[2],
        env=bare | {"TAPROBE_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "dagster" / "history" / "runs.db").is_file()
