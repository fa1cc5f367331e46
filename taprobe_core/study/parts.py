"""Small parts that a study is written with: shared field types, splits, what is read from models.

What belongs here constrains one value; what relates two values belongs to the part that holds both.
`SPEED_ONLY` names the fields that decide no value. Dividing problems belongs in
`taprobe_core.splits`, reading states and attention in `taprobe_core.activations` and
`taprobe_core.attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
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
    """Return a fault that keeps its remedy; `study.wording` reads both from the context."""
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


class Splits(StudyPart):
    """How problems are divided; the problem is the unit, a sentence never leaves its own.

    `lopo_validation` says which of the other problems a fold that leaves one out is tuned on: the
    next ones in turn (`rotating`), or always the smallest ids (`smallest`, as the earlier script
    system did, so that nearly all folds are tuned on the same problems). `inner_folds` of 2 or more
    divide the training and validation problems of every fold again, in so many groups: each group
    is scored by probes that saw the other groups alone, choices are made on those scores, and the
    probe that is tested is fitted on all of them (nested selection).
    """

    protocols: Annotated[
        tuple[Literal["holdout", "lopo"], ...], Field(min_length=1), AfterValidator(distinct)
    ] = ("holdout", "lopo")
    train_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.7
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    seed: Seed = 0
    lopo_validation: Literal["rotating", "smallest"] = "rotating"
    inner_folds: Annotated[int, Field(ge=0, le=50)] = 0

    @model_validator(mode="after")
    def _room_for_test(self) -> Self:
        if self.train_fraction + self.val_fraction >= 1:
            raise study_fault(
                f"train_fraction {self.train_fraction} and val_fraction {self.val_fraction} leave "
                "no problem for test",
                "make their sum less than 1",
            )
        return self

    @model_validator(mode="after")
    def _inner_folds_divide(self) -> Self:
        if self.inner_folds == 1:
            raise study_fault("inner_folds is 1", "use 0 for none, or 2 and more")
        return self


Pooling = Literal["mean", "last", "max", "boundary", "tokens"]
Storage = Literal["float16", "bfloat16", "float32"]


def _in_order(poolings: tuple[Pooling, ...]) -> tuple[Pooling, ...]:
    """Put them in one order: a set written in another order is the same set of files."""
    return tuple(pooling for pooling in get_args(Pooling) if pooling in poolings)


class Activations(StudyPart):
    """How hidden states are read and kept.

    `poolings`: of each sentence the mean, the last token's state, the maximum of every dimension,
    the state of the token before it (`boundary`), or the states of all its tokens; any number of
    them in the same pass. `storage` is the number type on disk. `token_budget` is the number of
    tokens in a forward pass, for which short texts are packed together; null is one text a pass on
    a CPU and 8,192 tokens on an accelerator.
    """

    poolings: Annotated[
        tuple[Pooling, ...],
        Field(min_length=1),
        AfterValidator(distinct),
        AfterValidator(_in_order),
    ] = ("mean",)
    storage: Storage = "float16"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    token_budget: Count | None = None


SPEED_ONLY = frozenset({"device", "token_budget"})
"""Fields of `Activations` that decide no value, and so stand in no fingerprint."""


class Attention(StudyPart):
    """Which attention between sentences is kept of the layers that are read.

    `mode`: `off`; `light`, from the last `last_n` tokens to every sentence; `full`, from every
    sentence to every sentence. The rest says how scores are made of the full mass. `proximity`: a
    sentence is scored by those at least this many after it; the first number also chooses receiver
    heads, `n_receiver_heads` of them. `depth_control`: a late sentence spreads its attention over
    more sentences; correct for it by rank, by their count, or not.
    """

    mode: Literal["off", "light", "full"] = "off"
    last_n: Count = 4
    proximity: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(distinct)] = (4,)
    depth_control: Literal["none", "rank", "count"] = "none"
    n_receiver_heads: Count = 20
