"""What the registries of targets and estimators have in common: a field that holds a name of one.

A field of a fixed `Literal` would state the names a second time. What an entry says belongs in
`targets` and `estimators`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError, core_schema


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
