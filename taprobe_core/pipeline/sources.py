"""What a study names, found: its rollouts, its demo world, its models and their checkpoints.

From a study to the identity of everything that comes from outside, without reading a rollout or
loading a weight. What does not belong here: the keys that follow from it (plan).

The invariant: each question is asked once, whatever the answer; a model, a checkpoint or a revision
does not change while a study is open. What has been read is compared with the answer afterwards
(`check_dataset`, `check_model`), and with what it was at its first use always (`pins`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

from taprobe_core.checkpoints import (
    bos_token,
    checkpoint_identity,
    context_length,
    special_tokens,
    tokenizer_sha256,
)
from taprobe_core.demo import DemoWorld
from taprobe_core.errors import ConfigError, DataError, ModelError, TaprobeError
from taprobe_core.keys import Site
from taprobe_core.pipeline.demo_data import ensure_demo_world, pinned_world
from taprobe_core.rollouts import (
    RolloutSource,
    content_digest,
    listed_problems,
    open_source,
    problem_listing,
    source_files,
)
from taprobe_core.store import PinnedSource, Pins
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
        data_root: folder for what is built beside the store: the demo world, stand-in checkpoints
            and pins.
    """

    def __init__(self, study: Study, data_root: Path) -> None:
        self.study = study
        self.data_root = data_root
        self.pins = Pins(data_root / "pins")

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
        return self._checkpoint(model)

    @_asked_once
    def special_tokens(self, model: str) -> str:
        """What is said of special tokens beside the model's `tokenizer.json`, as JSON."""
        return special_tokens(self.model(model))

    def check_model(self, model: str) -> None:
        """Compare a model's files, after they were read, with what the plan says they are.

        Raises:
            ModelError: they changed since the plan was opened.
        """
        if self._checkpoint(model) != self.checkpoint(model):
            raise ModelError(
                "checkpoint or tokenizer changed while it was in use", f"model {model}", "run again"
            )

    def _checkpoint(self, model: str) -> dict[str, str]:
        spec = self.model(model)
        if self.demo is not None and spec.tokenizer == str(self.demo.tokenizer_folder):
            folder = self.demo.tokenizer_folder
            names = sorted(file.name for file in folder.iterdir())
            listing = {folder.name: names}
            files = {f"{folder.name}/{name}": folder / name for name in names}
            self.pins.check(pinned_world(self.demo), dict(files), listing)
        # The tokenizer first: a stand-in is made to fit it.
        tokenizer = tokenizer_sha256(spec, self.pins)
        identity = checkpoint_identity(spec, self.checkpoints_root, self.pins)
        return {
            **identity,
            "tokenizer_sha256": tokenizer,
            **({"bos": NO_BOS} if self.bos_token(model) is None else {}),
        }

    @_asked_once
    def context_length(self, model: str) -> int | None:
        """The most tokens of a text that the model takes; None where it does not say."""
        return context_length(self.model(model))

    @_asked_once
    def bos_token(self, model: str) -> str | None:
        """The token that each text of the model begins with; None where it has none."""
        return bos_token(self.model(model))

    @_asked_once
    def dataset_version(self, model: str, setting: str) -> str:
        """Digest of the source files of one model and setting."""
        return self._dataset_version(model, setting)

    def check_dataset(self, model: str, setting: str) -> None:
        """Compare the files of one model and setting with what the plan says they are.

        Of a hub's dataset the files are fetched and hashed here, at their first use.

        Raises:
            DataError: they changed since the plan was opened, or differ from a blob's name.
            SourceUnavailableError: they cannot be fetched.
        """
        if self._is_hub:
            files = source_files(self.source, self.model(model), self.study.rollouts, setting)
            there = {name: path for name, path in files.items() if path is not None}
            self.pins.check(self._pinned_dataset, dict(there))
        if self._dataset_version(model, setting) != self.dataset_version(model, setting):
            raise DataError(
                "the dataset changed while it was in use",
                str(self._pinned_dataset.root),
                "run again",
            )

    @property
    def _is_hub(self) -> bool:
        return self.study.rollouts.source.kind == "hub"

    @cached_property
    def _pinned_dataset(self) -> PinnedSource:
        if self.demo is not None:
            return pinned_world(self.demo)
        identity = self.source.identity()
        if self._is_hub:
            place = f"{identity['repo']}@{identity['revision']}"
            return PinnedSource(
                "dataset",
                identity,
                Path(place),
                f"run `taprobe run` where {place} can be reached",
                absence="is_fetched_again",
            )
        return PinnedSource(
            "dataset", identity, Path(identity["folder"]), "bring the files back as they were"
        )

    def _dataset_version(self, model: str, setting: str) -> str:
        spec, rollouts = self.model(model), self.study.rollouts
        digest = content_digest(self.source, spec, rollouts, setting, self._hash_dataset)
        if not self._is_hub:
            return digest
        start = "/".join((spec.rollouts_dir, rollouts.sampling, setting, ""))
        self.pins.recheck(self._pinned_dataset, start)
        accepted = self.pins.accepted_identity(self._pinned_dataset, start)
        return f"{digest}+{accepted['accepted_sha256']}" if accepted else digest

    def _hash_dataset(
        self, files: Mapping[str, Path | None], listings: Mapping[str, Sequence[str]]
    ) -> dict[str, str]:
        prefix = "" if self.demo is None else f"{self.demo.rollouts_folder.name}/"
        hashes = self.pins.check(
            self._pinned_dataset,
            {f"{prefix}{name}": path for name, path in files.items()},
            {f"{prefix}{folder}": names for folder, names in listings.items()},
        )
        return {name.removeprefix(prefix): sha256 for name, sha256 in hashes.items()}

    @_asked_once
    def problem_ids(self) -> tuple[int, ...]:
        """Every problem that some model and setting of the study has, ascending.

        Folds are made from these, so that all cells are divided alike and a problem that is test in
        one setting trains in none.
        """
        rollouts = self.study.rollouts
        places = [
            (model, setting) for model in self.study.models for setting in self.study.settings
        ]
        for model, setting in [] if self._is_hub else places:
            # Folds of one cell follow from the problems of all, so these may not change unsaid.
            self._hash_dataset(
                {}, problem_listing(self.source, self.model(model), rollouts, setting)
            )
        found = {
            problem_id
            for model, setting in places
            for problem_id in listed_problems(self.source, self.model(model), rollouts, setting)
        }
        return tuple(sorted(found))
