"""The part of a study that says how problems are divided.

The division itself belongs in `taprobe_core.splits`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from taprobe_core.study.fields import Seed, StudyPart, distinct, study_fault


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
