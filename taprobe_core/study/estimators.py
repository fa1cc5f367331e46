"""The estimators: for each its name, its settings, what it reads and what a sweep tunes of it.

All that study, content hash and sweep know of an estimator stands in its entry here; how it is
solved and how a stored probe of it scores stands in `taprobe_core.probes.registry` under the same
name. What a setting is called, its range, default and values in a sweep stand here, too.

Invariant: every setting of an entry is a field of `EstimatorSettings`, or of the part of it that
the entry names; every one that is tuned is a field of `Tuning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from taprobe_core.study.parts import Count, Depth, NameOf, StudyPart, Width, distinct

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Hidden = Annotated[tuple[Width, ...], Field(min_length=1, max_length=64)]


class TokenProbe(StudyPart):
    """Settings of the probes that read token sets.

    A ReLU network of `depth` layers of `width` reads each token; `n_heads` heads pool a sentence.
    `window` tokens make a window of `rolling_multimax`. `training: soft` replaces the maximum over
    tokens or windows by a softmax-weighted mean while training; scores always take the maximum.
    `loss` is that of continuous targets. Training stops after `patience` epochs without a better
    loss on the fold's validation problems.
    """

    n_heads: Width = 4
    width: Width = 128
    depth: Depth = 1
    window: Count = 10
    training: Literal["hard", "soft"] = "hard"
    loss: Literal["huber", "squared"] = "huber"
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 0.0
    batch_size: Count = 32
    max_epochs: Count = 50
    patience: Count = 5


class EstimatorSettings(StudyPart):
    """Settings of a recipe that some estimators have and others lack."""

    regularization: Positive = 1.0
    hidden: Hidden = (100, 100)
    max_iter: Count = 300
    early_stopping: bool = True
    held_out: Literal["rows", "problems"] = "rows"
    token_probe: TokenProbe = TokenProbe()


class Tuning(StudyPart):
    """Values that stage 3 crosses, each for the estimators that read it alone.

    `regularization` is read by `linear`; `hidden` and `early_stopping` by `mlp`; the rest by the
    probes of token sets, of which `training` by `multimax` and `rolling_multimax`, `window` by
    `rolling_multimax`, and `loss` on continuous targets.
    """

    regularization: Annotated[tuple[Positive, ...], AfterValidator(distinct)] = (
        0.001,
        0.01,
        0.1,
        1.0,
        10.0,
    )
    hidden: Annotated[tuple[Hidden, ...], AfterValidator(distinct)] = ((50,), (100,), (100, 100))
    early_stopping: Annotated[tuple[bool, ...], AfterValidator(distinct)] = (True, False)
    n_heads: Annotated[tuple[Width, ...], AfterValidator(distinct)] = (4, 10)
    width: Annotated[tuple[Width, ...], AfterValidator(distinct)] = (128,)
    depth: Annotated[tuple[Depth, ...], AfterValidator(distinct)] = (1, 2)
    learning_rate: Annotated[tuple[Positive, ...], AfterValidator(distinct)] = (1e-4, 1e-3)
    weight_decay: Annotated[tuple[NotNegative, ...], AfterValidator(distinct)] = (0.0, 3e-3)
    training: Annotated[tuple[Literal["hard", "soft"], ...], AfterValidator(distinct)] = (
        "hard",
        "soft",
    )
    window: Annotated[tuple[Count, ...], AfterValidator(distinct)] = (5, 10)
    loss: Annotated[tuple[Literal["huber", "squared"], ...], AfterValidator(distinct)] = (
        "huber",
        "squared",
    )


@dataclass(frozen=True)
class EstimatorSetting:
    """One setting that an estimator reads.

    Attributes:
        name: field of the settings.
        is_tuned: whether stage 3 of a sweep crosses its values.
        only_with: a setting beside it that must be on for it to be read.
        only_continuous: whether it is read for targets of values alone, not for classes.
    """

    name: str
    is_tuned: bool = False
    only_with: str | None = None
    only_continuous: bool = False


@dataclass(frozen=True)
class EstimatorEntry:
    """One estimator.

    Attributes:
        name: as studies write it.
        settings: what it reads, in the order in which a sweep tunes it, the last fastest.
        part: field of `EstimatorSettings` that holds the settings; None where each is a field.
        is_linear: whether it weighs features and no more. Recipes of such probes are what
            `any_linear_probe` asks for.
        is_stochastic: whether its scores depend on the seed.
        reads_tokens: whether it reads the set of a sentence's token states, and that alone.
        reads_text: whether `text` may be among its features.
    """

    name: str
    settings: tuple[EstimatorSetting, ...]
    part: str | None = None
    is_linear: bool = False
    is_stochastic: bool = True
    reads_tokens: bool = False
    reads_text: bool = False

    def read(self, settings: Any, *, is_binary: bool) -> list[EstimatorSetting]:
        """Return the settings that decide the scores.

        Args:
            settings: of a recipe: the object that has them as attributes.
            is_binary: whether the target is.
        """
        return [
            each
            for each in self.settings
            if not (each.only_continuous and is_binary)
            and (each.only_with is None or getattr(settings, each.only_with))
        ]


_TOKENS = (
    *(
        EstimatorSetting(name, is_tuned=True)
        for name in ("n_heads", "width", "depth", "learning_rate", "weight_decay")
    ),
    EstimatorSetting("loss", is_tuned=True, only_continuous=True),
    *(EstimatorSetting(name) for name in ("batch_size", "max_epochs", "patience")),
)
_TRAINING = EstimatorSetting("training", is_tuned=True)
_WINDOW = EstimatorSetting("window", is_tuned=True)

ESTIMATORS: dict[str, EstimatorEntry] = {
    entry.name: entry
    for entry in (
        EstimatorEntry(
            "linear",
            (EstimatorSetting("regularization", is_tuned=True),),
            is_linear=True,
            is_stochastic=False,
            reads_text=True,
        ),
        EstimatorEntry(
            "mlp",
            (
                EstimatorSetting("hidden", is_tuned=True),
                EstimatorSetting("early_stopping", is_tuned=True),
                EstimatorSetting("max_iter"),
                EstimatorSetting("held_out", only_with="early_stopping"),
            ),
        ),
        EstimatorEntry("attention", _TOKENS, "token_probe", reads_tokens=True),
        EstimatorEntry("multimax", (*_TOKENS, _TRAINING), "token_probe", reads_tokens=True),
        EstimatorEntry(
            "rolling_multimax", (*_TOKENS, _TRAINING, _WINDOW), "token_probe", reads_tokens=True
        ),
    )
}
"""Name -> estimator."""

Estimator = Annotated[str, NameOf(ESTIMATORS)]
"""Name of an estimator."""


def token_estimators() -> tuple[str, ...]:
    """Return the estimators that read the set of a sentence's token states."""
    return tuple(name for name, entry in ESTIMATORS.items() if entry.reads_tokens)
