"""Types that the parts of a study share: names, seeds, counts, and the fault with its remedy.

What belongs here constrains one value. What relates two values belongs to the part that holds both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from taprobe_core.errors import ConfigError
from taprobe_core.keys import check_slug, is_reserved


class StudyPart(BaseModel):
    """Base of every part: frozen, unknown keys refused, no coercion, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, eq=False)
class NameOf:
    """Annotation of a field that holds a name of a registry, as it stands when a value is read.

    Faults and JSON schema are those of a `Literal` of the names.

    Attributes:
        entries: the registry.
    """

    entries: Mapping[str, object]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Return what validates the field."""
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the schema of the field: the names that there are."""
        return {"enum": list(self.entries), "type": "string"}

    def _checked(self, value: Any) -> str:
        if isinstance(value, str) and value in self.entries:
            return value
        *others, last = (repr(name) for name in self.entries)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise PydanticKnownError("literal_error", {"expected": expected})


def study_fault(what: str, fix: str, at: tuple[str | int, ...] = ()) -> PydanticCustomError:
    """Return a fault that keeps its remedy; `study.wording` reads both from the context.

    Args:
        what: what was found, in one sentence without a full stop.
        fix: the edit to make.
        at: keys and indices from the validated part down to the value in question.
    """
    return PydanticCustomError("study", "{what}: {fix}", {"what": what, "fix": fix, "at": at})


def _slug(value: str) -> str:
    try:
        return check_slug(value, "")
    except ConfigError as error:
        raise study_fault(error.what, error.fix or "") from None


def free_name(value: str) -> str:
    """Return `value` unless it is reserved; raises a `study_fault`."""
    return _slug(value) if is_reserved(value) else value


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `values`, of which none may repeat; raises a `study_fault` naming those that do."""
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise study_fault(f"{repeated} given more than once", "give each value once")
    return values


FOLDER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"
HUB_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"
COMMIT_SHA = r"^[0-9a-f]{40}$"

Slug = Annotated[str, AfterValidator(_slug)]
FolderName = Annotated[str, Field(pattern=FOLDER_NAME)]
HubId = Annotated[str, Field(pattern=HUB_ID)]
CommitSha = Annotated[str, Field(pattern=COMMIT_SHA)]
LocalPath = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=16_384)]
Depth = Annotated[int, Field(ge=1, le=64)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
