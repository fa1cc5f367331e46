"""Every error a user can meet, as one tree.

Each error says what was found, where (a file, and in it a field or a record), and how to fix it.
The core raises; the command line prints without a traceback; Dagster turns `where` and `fix` into
failure metadata. Whoever prints one prints no control characters with it. An exception that is not
a `TaprobeError` is a defect of ours and keeps its traceback; where other pieces of work can go on
without the one that raised it (`attempted`), it becomes an `UnexpectedError`.

    TaprobeError
      ConfigError                study file, key, environment variable
        PlanError                a budget or a split that nothing can satisfy
        HomeError                Dagster's folder, its settings and its databases
      DataError                  dataset files and the tables made from them
        SourceUnavailableError   the dataset's place cannot be reached; says nothing about the data
        SchemaError              a table breaks its contract; lists every fault
        LabelError               labels that cannot be computed
        SpanError                a sentence that cannot be placed in its text
        LeakageError             one problem on two sides of a split
        NotEnoughDataError       found n, need m
      ModelError                 checkpoints and tokenizers
        ModelMissingError        absent, and offline
        ModelMismatchError       not the shape or the vocabulary that the study says
        UnsafeModelError         would run code: pickled weights, remote code
      NumericsError              results that are not numbers
        NonFiniteError           NaN or infinity, with layer and sentence
      FailedCheckError           a blocking check failed, so what comes after is refused
      FailedCellsError           cells of a stage failed, by errors of several kinds
      UnexpectedError            code failed on one input in a way that nobody foresaw
      ArtifactError              the store
        MissingArtifactError     never built, or pruned
        CorruptArtifactError     bytes differ from the manifest
        StaleArtifactError       written by another format version
        BusyArtifactError        another process is writing it
        DiskFullError            bytes needed and free
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""Characters that a terminal obeys, or that it cannot be sent, but for a line's end and a tab."""


def visible(text: str) -> str:
    r"""Return a text that a terminal shows and does not obey.

    Names of files, keys of a study and texts of a dataset come from others; a terminal would take
    their control characters for commands, and their marks of direction turn a line around.

    Example:
        >>> visible("a\x1b[2Jb")
        'a\\u001b[2Jb'
    """
    return _OBEYED.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


class TaprobeError(Exception):
    """Base of all errors that a user can act on.

    Args:
        what: what was found, in one sentence without a full stop.
        where: file, and in it the field or record.
        fix: the command to type or the edit to make.
    """

    def __init__(self, what: str, where: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.what} in {self.where}" if self.where else self.what
        return visible(f"{head}\nFix: {self.fix}" if self.fix else head)


class ConfigError(TaprobeError):
    """The study file or an environment variable is wrong."""


class PlanError(ConfigError):
    """A budget, an objective or a split that no plan can satisfy."""


class HomeError(ConfigError):
    """The folder of Dagster's event log cannot be used; the artifacts are not concerned."""


class DataError(TaprobeError):
    """A dataset file, or a table made from one, is wrong."""


class SourceUnavailableError(DataError):
    """The dataset cannot be reached: no network, offline without a cache, a refused request.

    Never a reason to skip a problem: the problem may be sound.
    """


class SchemaError(DataError):
    """A table breaks its contract. `faults` lists every one of them."""

    def __init__(
        self,
        what: str,
        where: str | None = None,
        fix: str | None = None,
        faults: Sequence[str] = (),
    ) -> None:
        self.faults = tuple(faults)
        listed = "".join(f"\n  - {fault}" for fault in self.faults)
        super().__init__(what, f"{where or 'table'}:{listed}" if listed else where, fix)


class LabelError(DataError):
    """Labels cannot be computed from these rollouts."""


class SpanError(DataError):
    """A sentence cannot be placed in its text, or a range is empty or outside."""


class LeakageError(DataError):
    """The same problem stands on two sides of a split."""


class NotEnoughDataError(DataError):
    """Fewer problems, sentences or classes than the step needs."""


class ModelError(TaprobeError):
    """A checkpoint or a tokenizer cannot be used."""


class ModelMissingError(ModelError):
    """The checkpoint is not on this machine and cannot be fetched."""


class ModelMismatchError(ModelError):
    """The checkpoint is not what the study says: depth, vocabulary, tokenizer."""


class UnsafeModelError(ModelError):
    """Loading the checkpoint would run code."""


class NumericsError(TaprobeError):
    """A computation gave no usable number."""


class NonFiniteError(NumericsError):
    """An activation or a score is NaN or infinite."""


class FailedCheckError(TaprobeError):
    """A blocking check of an artifact failed, so nothing is computed from it."""


class FailedCellsError(TaprobeError):
    """Cells failed by errors of several kinds; what does not read them is committed."""


class UnexpectedError(TaprobeError):
    """Code of a library or of ours failed on one input; `__cause__` is what it raised."""


class ArtifactError(TaprobeError):
    """The store cannot serve or take an artifact."""


class MissingArtifactError(ArtifactError):
    """The artifact was never built, or has been pruned."""


class CorruptArtifactError(ArtifactError):
    """Bytes on disk differ from the manifest."""


class StaleArtifactError(ArtifactError):
    """The artifact was written by another version of the format."""


class BusyArtifactError(ArtifactError):
    """Another process holds the artifact's lock."""


class DiskFullError(ArtifactError):
    """No space left; names the folder, the bytes needed and the bytes free."""


def is_of_machine(error: Exception) -> bool:
    """Whether an error says that other work would fail too: disk, store, memory, device.

    An artifact that is absent, cut or of another version concerns only what reads it.
    """
    if isinstance(error, TaprobeError):
        return isinstance(error, DiskFullError | BusyArtifactError) or type(error) is ArtifactError
    # PyTorch's own, which this module does not import: the device takes no more work.
    return isinstance(error, OSError | MemoryError) or type(error).__name__ == "AcceleratorError"


def attempted(work: Callable[[], T], where: str) -> T | TaprobeError:
    """Do one piece of work of several; return its error, so that the other pieces can go on.

    Args:
        work: the piece.
        where: names it, for an error that nobody foresaw. Whoever takes that error logs it: its
            `__cause__` has the traceback.

    Returns:
        What `work` returns, or its error.

    Raises:
        Exception: an error of the machine (`is_of_machine`), which the others would meet too.
    """
    try:
        return work()
    except Exception as error:
        if is_of_machine(error):
            raise
        return _own(error, where)


def original(error: TaprobeError) -> BaseException:
    """Return what was raised where `attempted` returned this error."""
    return (error.__cause__ or error) if isinstance(error, UnexpectedError) else error


def _own(error: Exception, where: str) -> TaprobeError:
    if isinstance(error, TaprobeError):
        return error
    said = (str(error).splitlines() or ["no message"])[0]
    unexpected = UnexpectedError(
        f"{type(error).__name__}: {said}",
        where,
        "read the traceback in the log; mend or leave out the input that it names, or report it as "
        "a defect",
    )
    unexpected.__cause__ = error
    return unexpected
