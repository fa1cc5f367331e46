"""What a study names, found: its rollouts, its demo world, its models and their checkpoints.

From a study to the identity of everything that comes from outside, without reading a rollout or
loading a weight. What does not belong here: the keys that follow from it (plan).

The invariant: each question is asked once, whatever the answer; a model, a checkpoint or a revision
does not change while a study is open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

from taprobe_core.checkpoints import bos_token, checkpoint_identity, tokenizer_sha256
from taprobe_core.demo import DemoWorld
from taprobe_core.errors import ConfigError, TaprobeError
from taprobe_core.keys import Site
from taprobe_core.pipeline.world import ensure_demo_world
from taprobe_core.rollouts import (
    RolloutSource,
    content_digest,
    listed_problems,
    open_source,
)
from taprobe_core.study import DemoSource, Model, PolicySource, Study

T = TypeVar("T")

NO_BOS = "none"
"""What an identity and a description say of a model whose texts begin with no BOS token."""


def _asked_once(method: Callable[..., T]) -> Callable[..., T]:
    """Cache a plan's method, and its errors too: an unreachable hub costs half a minute a try."""

    @cache
    def ask(*arguments: Any) -> T | TaprobeError:
        try:
            return method(*arguments)
        except TaprobeError as error:
            return error

    @wraps(method)
    def answer(*arguments: Any) -> T:
        found = ask(*arguments)
        if isinstance(found, TaprobeError):
            raise found
        return found

    return answer


class Sources:
    """What one study names, found.

    Args:
        study: the study.
        data_root: folder for what is built beside the store: the demo world and stand-in
            checkpoints.
    """

    def __init__(self, study: Study, data_root: Path) -> None:
        self.study = study
        self.data_root = data_root

    @property
    def checkpoints_root(self) -> Path:
        """Folder of the stand-in checkpoints."""
        return self.data_root / "checkpoints"

    @cached_property
    def demo(self) -> DemoWorld | None:
        """The demo world, built on first use; None when the study has another source."""
        source = self.study.rollouts.source
        if not isinstance(source, DemoSource | PolicySource):
            return None
        return ensure_demo_world(self.study, source, self.data_root / "demo")

    @cached_property
    def source(self) -> RolloutSource:
        """The opened rollout source; a hub revision is resolved here, once."""
        return open_source(self.study.rollouts, self.demo.rollouts_folder if self.demo else None)

    @cache
    def model(self, key: str) -> Model:
        """The model of a key; a stand-in without a tokenizer gets the demo's.

        Raises:
            ConfigError: the study has no such model.
        """
        if key not in self.study.models:
            raise ConfigError(
                f"no model {key!r}",
                f"study {self.study.name}",
                f"use one of {list(self.study.models)}",
            )
        model = self.study.models[key]
        is_stand_in = model.checkpoint.kind == "stand_in"
        if self.demo is not None and model.tokenizer is None and is_stand_in:
            return model.model_copy(update={"tokenizer": str(self.demo.tokenizer_folder)})
        return model

    def sites(self, model: str) -> tuple[Site, ...]:
        """The sites of one model, in the order of the study."""
        return tuple(site for site in self.study.sites if site.model == model)

    @_asked_once
    def checkpoint(self, model: str) -> Mapping[str, str]:
        """Identity of the model's checkpoint and tokenizer, without loading weights.

        `bos` is there, as `none`, for a model whose texts begin with no BOS token.
        """
        spec = self.model(model)
        return {
            **checkpoint_identity(spec),
            "tokenizer_sha256": tokenizer_sha256(spec),
            **({"bos": NO_BOS} if self.bos_token(model) is None else {}),
        }

    @_asked_once
    def bos_token(self, model: str) -> str | None:
        """The token that each text of the model begins with; None where it has none."""
        return bos_token(self.model(model))

    @_asked_once
    def dataset_version(self, model: str, setting: str) -> str:
        """Digest of the source files of one model and setting."""
        return content_digest(self.source, self.model(model), self.study.rollouts, setting)

    @_asked_once
    def problem_ids(self) -> tuple[int, ...]:
        """Every problem that some model and setting of the study has, ascending.

        Folds are made from these, so that all cells are divided alike and a problem that is test in
        one setting trains in none.
        """
        places = [
            (model, setting) for model in self.study.models for setting in self.study.settings
        ]
        found = {
            problem_id
            for model, setting in places
            for problem_id in listed_problems(
                self.source, self.model(model), self.study.rollouts, setting
            )
        }
        return tuple(sorted(found))
