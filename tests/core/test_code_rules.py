"""Rules that hold for every module of the project, read off its source."""

from __future__ import annotations

import ast
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import taprobe_core
from taprobe_core import errors

ROOT = Path(taprobe_core.__file__).parents[1]
FILES = sorted(
    path
    for package in ("taprobe_core", "taprobe_dagster")
    for path in (ROOT / package).rglob("*.py")
)
MAX_LINES = 500


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def test_modules_are_short_and_say_what_they_are_for(trees: dict[Path, ast.Module]) -> None:
    assert len(FILES) > 50
    long = [names(path) for path in FILES if len(path.read_text().splitlines()) > MAX_LINES]
    mute = [names(path) for path, tree in trees.items() if not ast.get_docstring(tree)]
    assert (long, mute) == ([], [])


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public functions, classes and methods; what is nested in a function is nobody's business."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") or any(_is_overload(each) for each in node.decorator_list):
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{prefix}{node.name}.")


def _is_overload(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Name) and decorator.id == "overload"


def test_everything_public_has_a_docstring(trees: dict[Path, ast.Module]) -> None:
    mute = [
        f"{names(path)}: {name}"
        for path, tree in trees.items()
        for name, node in public(tree.body)
        if not ast.get_docstring(node)  # type: ignore[arg-type]
    ]
    assert mute == []


def leaves(kind: type[errors.TaprobeError] = errors.TaprobeError) -> list[type]:
    return [kind, *(each for sub in kind.__subclasses__() for each in leaves(sub))]


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_an_error_is_two_lines_and_keeps_its_parts(kind: type[errors.TaprobeError]) -> None:
    error = kind("a thing", "file.yaml:3, models.tiny", "edit it")
    head, fix = str(error).split("\n")
    assert head == "a thing in file.yaml:3, models.tiny"
    assert fix == "Fix: edit it"
    assert (error.what, error.where, error.fix) == (
        "a thing",
        "file.yaml:3, models.tiny",
        "edit it",
    )
    assert str(kind("a thing")) == "a thing"
    assert error.args == (str(error),)
    assert kind.__module__ == "taprobe_core.errors"


def test_every_error_is_in_the_tree_at_the_head_of_its_module() -> None:
    for kind in leaves():
        assert kind.__name__ in str(errors.__doc__)


def called(tree: ast.Module) -> set[str]:
    """Names that are called, as in `raise X(...)`, or handed on as a class to call."""
    return {
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    }


def test_every_error_that_has_no_narrower_one_is_raised(trees: dict[Path, ast.Module]) -> None:
    used = set().union(*(called(tree) for tree in trees.values()))
    idle = [kind.__name__ for kind in leaves() if not kind.__subclasses__()]
    assert sorted(name for name in idle if name not in used) == []


def test_every_error_that_is_made_says_how_to_fix_it(trees: dict[Path, ast.Module]) -> None:
    kinds = {kind.__name__ for kind in leaves()}
    without = [
        f"{names(path)}:{node.lineno}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in kinds
        and len(node.args) < 3
        and "fix" not in {keyword.arg for keyword in node.keywords}
    ]
    assert without == []


def test_the_core_prints_nothing_and_catches_no_unknown_error(
    trees: dict[Path, ast.Module],
) -> None:
    core = {path: tree for path, tree in trees.items() if "taprobe_core" in names(path)}
    prints = [names(path) for path, tree in core.items() if "print" in _bare_calls(tree)]
    assert prints == []
    broad = [
        f"{names(path)}:{node.lineno}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or {"Exception", "BaseException"} & _exception_names(node.type))
        and not any(isinstance(each, ast.Raise) for each in ast.walk(node))
    ]
    assert broad == []


def _bare_calls(tree: ast.Module) -> set[str]:
    return {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def _exception_names(node: ast.expr) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def test_the_tree_stays_small_enough_to_be_read() -> None:
    core = [path for path in FILES if path.is_relative_to(ROOT / "taprobe_core")]
    assert len(core) <= 220
    flat = [path.name for path in core if path.parent.name == "taprobe_core"]
    assert len(flat) <= 6, flat
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert max(len(each.get("layers", [])) for each in contract["contracts"]) <= 18
    named = [names(path) for path in FILES if re.search(r"\breceiver_heads\b", path.read_text())]
    assert len(named) <= 3, named


def imported(tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the project that a module imports, in functions and for type checkers too."""
    return {
        full if full in modules else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for full in (f"{node.module}.{alias.name}" for alias in node.names)
    } & modules


def test_no_two_modules_import_each_other(trees: dict[Path, ast.Module]) -> None:
    by_name = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): tree
        for path, tree in trees.items()
    }
    graph = {name: imported(tree, set(by_name)) - {name} for name, tree in by_name.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
loaded = sorted({"dagster", "taprobe_dagster"} & {name.split(".")[0] for name in sys.modules})
sys.exit(f"loaded: {loaded}" if loaded else 0)
"""


TRITON_MODULES = {
    "taprobe_core.activations.kernels",
    "taprobe_core.solvers.networks.kernels",
    "taprobe_core.solvers.tokens.kernels",
}


def test_the_core_never_imports_dagster() -> None:
    modules = [each.name for each in pkgutil.walk_packages(taprobe_core.__path__, "taprobe_core.")]
    assert "taprobe_core.pipeline.run" in modules
    if find_spec("triton") is None:  # comes with PyTorch for CUDA, and is imported there alone
        modules = [name for name in modules if name not in TRITON_MODULES]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
