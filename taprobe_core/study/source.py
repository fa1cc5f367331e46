"""Load the study that a run is about: which file, then text to a `Study`, or every fault at once.

The default is the shipped demo study; the environment variable TAPROBE_STUDY names another. A path
that is relative, in the variable or inside a study, is relative to the working directory, not to
the study file. What the keys mean belongs in `config`.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from taprobe_core.errors import ConfigError
from taprobe_core.study.config import Study
from taprobe_core.study.document import MAX_CHARACTERS, fault_error, read_document
from taprobe_core.study.wording import value_faults

STUDY_VARIABLE = "TAPROBE_STUDY"
DEFAULT_STUDY = "demo"


def load_study(
    path: Path | str | None = None, *, environ: Mapping[str, str] | None = None
) -> Study:
    """Load a study file.

    Args:
        path: a file, or the name of a shipped study such as `pilot`. None takes TAPROBE_STUDY, and
            when that is unset or empty the shipped demo study.
        environ: environment variables; None takes the process's own.

    Returns:
        The study, its `${VAR}` replaced.

    Raises:
        ConfigError: no such file, not readable as UTF-8, or any fault of `parse_study`.
    """
    variables = os.environ if environ is None else environ
    asked = str(path or variables.get(STUDY_VARIABLE) or DEFAULT_STUDY)
    file = _find(asked)
    where = _as_shown(file)
    try:
        if file.stat().st_size > 4 * MAX_CHARACTERS:
            raise ConfigError("a file too large for a study", where, "name a study file")
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        what = f"byte 0x{error.object[error.start]:02x}, which is not UTF-8"
        raise ConfigError(what, f"{where}:{line}", "save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(
            f"a study that cannot be read ({error.strerror})", where, "check its permissions"
        ) from error
    return parse_study(text, where, environ=variables)


def parse_study(text: str, where: str, *, environ: Mapping[str, str] | None = None) -> Study:
    """Read a study from YAML text.

    Locations (`LOCATIONS` in document) may hold `${VAR}` and `${VAR:-default}`.

    Args:
        text: YAML.
        where: the file, for messages.
        environ: environment variables; None takes the process's own.

    Raises:
        ConfigError: one error with every fault found: not YAML, duplicate or unknown keys, missing
            keys, wrong types, values out of range, NaN, unset variables.
    """
    document = read_document(text, where, os.environ if environ is None else environ)
    try:
        # JSON is the one mode in which strict models take lists for tuples and 90 for 90.0.
        study = Study.model_validate_json(json.dumps(document.values, allow_nan=False))
    except ValidationError as error:
        raise fault_error([*document.faults, *value_faults(error, document)], where) from None
    if document.faults:
        raise fault_error(document.faults, where)
    return study


def shipped_studies() -> dict[str, Path]:
    """Return the studies that come with the project, by name: from the checkout, else as installed.

    Raises:
        ConfigError: the installation lacks them.
    """
    root = Path(__file__).resolve().parents[2]
    files = (
        sorted((root / "studies").glob("*.yaml"))
        or _installed_studies()
        or sorted((root / "share" / "taprobe" / "studies").glob("*.yaml"))
    )
    if not files:
        raise ConfigError(
            "no shipped studies in this installation",
            None,
            "pass a study file, or reinstall taprobe",
        )
    return {file.stem: file for file in files}


def _installed_studies() -> list[Path]:
    try:
        recorded = importlib.metadata.files("taprobe") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    listed = [file for file in recorded if file.match("taprobe/studies/*.yaml")]
    return sorted(path for file in listed if (path := Path(str(file.locate())).resolve()).is_file())


def _find(asked: str) -> Path:
    file = Path(asked).expanduser()
    if file.is_file():
        return file
    shipped = shipped_studies()
    name = asked.removesuffix(".yaml")
    if name in shipped and not file.exists():
        return shipped[name]
    guess = difflib.get_close_matches(file.stem, shipped, n=1)
    hint = f"did you mean `{guess[0]}`? " if guess else ""
    raise ConfigError(
        "a folder, where a study file is expected" if file.is_dir() else "no such study",
        _as_shown(file),
        f"{hint}name a study file, or one of the shipped studies: {', '.join(shipped)}",
    )


def _as_shown(file: Path) -> str:
    try:
        return str(file.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
