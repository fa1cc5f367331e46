"""A configuration: the factors that one stage of a sweep gives a site and setting, and their id.

What is fitted for a configuration belongs in `recipes`, which configurations there are in `space`.
Invariant: there is one way from factors to an id, and the order of factors does not enter it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

from taprobe_core.errors import DataError
from taprobe_core.store.canonical import canonical_json
from taprobe_core.study.activations import Pooling
from taprobe_core.study.probes import Residualize
from taprobe_core.study.targets import Target, TargetConfiguration
from taprobe_core.tables.sweep import SWEEP_FACTORS

Stage = Literal["stage1", "stage2", "stage3"]
STAGES: tuple[Stage, ...] = get_args(Stage)


def configuration_id(stage: Stage, factors: Mapping[str, Any]) -> str:
    """Return the stage and the first 12 hex of the sha256 of stage and factors.

    The hash is of `stage:` followed by the canonical JSON of the factors, so neither the order of
    factors nor the way that a configuration was reached changes it.

    Args:
        stage: of the sweep.
        factors: JSON values.

    Example:
        >>> configuration_id("stage1", {"layer": 4, "target": "importance_abs"})
        'stage1-fd83d7a95b43'
    """
    text = f"{stage}:{canonical_json(factors)}"
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class Configuration(TargetConfiguration):
    """One configuration. None stands for a factor that the stage or the target does not have.

    The settings of its target are those of `TargetConfiguration`.

    Attributes:
        stage: the stage that crosses these factors.
        model: key of the study's model.
        layer: block index.
        setting: the study's setting.
        target: what is predicted.
        drop_last_sentence: whether the last sentence of a problem is left out.
        pooling: what is read of a sentence's states.
        residualize: what is first taken from the target.
        attention: label of an attention variant; from stage 2 on.
        kind: the recipe that is tuned; stage 3.
        tuning: its settings as canonical JSON; stage 3.
    """

    stage: Stage
    model: str
    layer: int
    setting: str
    target: Target
    drop_last_sentence: bool = True
    pooling: Pooling = "mean"
    residualize: Residualize = "none"
    attention: str | None = None
    kind: str | None = None
    tuning: str | None = None

    @property
    def factors(self) -> dict[str, Any]:
        """The factors that it has, as JSON values."""
        values = {name: getattr(self, name) for name in FACTORS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def id(self) -> str:
        """The configuration's id."""
        return configuration_id(self.stage, self.factors)

    @property
    def settings(self) -> dict[str, Any]:
        """What stage 3 sets of the tuned kind; empty before."""
        return cast(dict[str, Any], json.loads(self.tuning or "{}"))

    @classmethod
    def of(cls, stage: str, factors: str) -> Self:
        """Read a configuration back from its stage and the canonical JSON of its factors.

        Raises:
            DataError: there is no such stage, or no such factor.
        """
        values = json.loads(factors)
        unknown = sorted(set(values) - set(FACTORS))
        if stage not in STAGES or unknown:
            raise DataError(
                f"stage {stage!r} with unknown factors {unknown}",
                "a sweep's table of configurations",
                "make the table again with this version",
            )
        return cls(stage=stage, **values)


FACTORS = (*SWEEP_FACTORS, "kind", "tuning")
"""Names of all factors, in the order of columns."""
