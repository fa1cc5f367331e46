"""From a study to the fingerprint of every artifact it will hold, before anything is computed.

A `Plan` answers one question for every stage and cell: under which key does, or will, its artifact
stand in the store? The key is a hash of the stage's code version, the slice of the study that the
stage depends on, and the keys upstream of it, so a plan costs no computation beyond hashing the
source files once. Running the stages belongs in the sibling modules.

    rollouts ─┬─ labels ──────────────┐
              └─ spans ── activations ┴─ fits ── probe_fits ── deferral_plans ─┐
                                                         └─────────────────────┴─ evaluation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

from taprobe_core.checkpoints import checkpoint_identity, tokenizer_sha256
from taprobe_core.demo import DemoWorld
from taprobe_core.errors import ConfigError, TaprobeError
from taprobe_core.keys import Site, Trial
from taprobe_core.pipeline.world import ensure_demo_world
from taprobe_core.rollouts import RolloutSource, content_digest, open_source
from taprobe_core.store import Artifact, ArtifactKey, Store, fingerprint
from taprobe_core.study import DemoSource, Model, PolicySource, ProbeRecipe, Study

CODE_VERSIONS: Mapping[str, str] = {
    "rollouts": "2",
    "labels": "2",
    "spans": "1",
    "activation_shards": "1",
    "activations": "1",
    "fits": "1",
    "probe_fits": "1",
    "deferral_plans": "1",
    "evaluation": "2",
    "leaderboard": "1",
    "study_report": "2",
}
"""Raised by hand when a stage's results change; every fingerprint below it then changes too."""


T = TypeVar("T")


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


class Plan:
    """Keys of one study's artifacts in one store.

    Args:
        study: the study.
        store: where the artifacts stand.
        data_root: folder for what is built beside the store: the demo world and stand-in
            checkpoints.
    """

    def __init__(self, study: Study, store: Store, data_root: Path) -> None:
        self.study = study
        self.store = store
        self.data_root = data_root
        self._configs: dict[ArtifactKey, Mapping[str, Any]] = {}

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

    @_asked_once
    def checkpoint(self, model: str) -> Mapping[str, str]:
        """Identity of the model's checkpoint and tokenizer, without loading weights."""
        spec = self.model(model)
        return {
            **checkpoint_identity(spec),
            "tokenizer_sha256": tokenizer_sha256(spec),
        }

    @_asked_once
    def dataset_version(self, model: str, setting: str) -> str:
        """Digest of the source files of one model and setting."""
        return content_digest(self.source, self.model(model), self.study.rollouts, setting)

    @cache
    def rollouts(self, model: str, setting: str) -> ArtifactKey:
        """Key of the rollout tables of one model and setting."""
        rollouts = self.study.rollouts
        return self._key(
            "rollouts",
            (model, setting),
            {
                "content": self.dataset_version(model, setting),
                "rollouts_dir": self.model(model).rollouts_dir,
                "setting": setting,
                "on_bad_problem": rollouts.on_bad_problem,
            },
        )

    @cache
    def labels(self, model: str, setting: str) -> ArtifactKey:
        """Key of the labels of one model and setting."""
        return self._key(
            "labels",
            (model, setting),
            self.study.labels.model_dump(mode="json"),
            self.rollouts(model, setting),
        )

    @cache
    def spans(self, model: str, setting: str) -> ArtifactKey:
        """Key of the texts and spans of one model and setting."""
        return self._key(
            "spans",
            (model, setting),
            {
                **self.study.spans.model_dump(mode="json"),
                "tokenizer_sha256": self.checkpoint(model)["tokenizer_sha256"],
                "on_bad_problem": self.study.rollouts.on_bad_problem,
            },
            self.rollouts(model, setting),
        )

    def _activation_config(self, site: Site) -> dict[str, Any]:
        return {
            "checkpoint": dict(self.checkpoint(site.model)),
            "layer": site.layer,
            "dtype": self.model(site.model).dtype,
            **self.study.activations.model_dump(mode="json", exclude={"device"}),
        }

    def activation_shard(
        self, site: Site, setting: str, problem_id: int, input_sha256: str
    ) -> ArtifactKey:
        """Key of one problem's activations: depends on its own tokens and spans, not on others."""
        return self._key(
            "activation_shards",
            (str(site), setting, f"problem_{problem_id}"),
            {**self._activation_config(site), "input_sha256": input_sha256},
        )

    @cache
    def activations(self, site: Site, setting: str) -> ArtifactKey:
        """Key of the index of one site and setting's shards."""
        return self._key(
            "activations",
            (str(site), setting),
            self._activation_config(site),
            self.spans(site.model, setting),
        )

    @cache
    def fit(self, site: Site, setting: str, recipe: ProbeRecipe, seed: int) -> ArtifactKey:
        """Key of one recipe's fits over all folds.

        A recipe that reads no activations is shared by all sites of the model, and a deterministic
        one by all seeds: each is solved once.
        """
        scope = str(site) if recipe.reads_activations else site.model
        name = f"{recipe.name}@s{seed:02d}" if recipe.is_stochastic else recipe.name
        upstream = [self.labels(site.model, setting), self.spans(site.model, setting)]
        if recipe.reads_activations:
            upstream.append(self.activations(site, setting))
        return self._key(
            "fits",
            (scope, setting, name),
            {
                "recipe": recipe.model_dump(mode="json"),
                "target": self.study.probes.target,
                "splits": self.study.splits.model_dump(mode="json"),
                "seed": seed if recipe.is_stochastic else None,
            },
            *upstream,
        )

    @cache
    def probe_fits(self, site: Site, trial: Trial) -> ArtifactKey:
        """Key of the index of one site and trial's fits."""
        fits = [
            self.fit(site, trial.setting, recipe, trial.seed)
            for recipe in self.study.probes.recipes
        ]
        return self._key("probe_fits", (str(site), str(trial)), {}, *fits)

    @cache
    def deferral_plans(self, site: Site, trial: Trial) -> ArtifactKey:
        """Key of one site and trial's deferral plans."""
        return self._key(
            "deferral_plans",
            (str(site), str(trial)),
            self.study.deferral.model_dump(mode="json"),
            self.probe_fits(site, trial),
        )

    @cache
    def evaluation(self, site: Site, setting: str) -> ArtifactKey:
        """Key of one site and setting's evaluation over all seeds."""
        trials = [Trial(setting, seed) for seed in self.study.seeds]
        return self._key(
            "evaluation",
            (str(site), setting),
            {
                **self.study.evaluation.model_dump(mode="json"),
                "target": self.study.probes.target,
            },
            *(self.probe_fits(site, trial) for trial in trials),
            *(self.deferral_plans(site, trial) for trial in trials),
        )

    def leaderboard(self) -> ArtifactKey:
        """Key of the study's leaderboard."""
        return self._key(
            "leaderboard",
            (self.study.name,),
            {},
            *(
                self.evaluation(site, setting)
                for site in self.study.sites
                for setting in self.study.settings
            ),
        )

    def study_report(self) -> ArtifactKey:
        """Key of the study's report."""
        return self._key(
            "study_report",
            (self.study.name,),
            self.study.model_dump(mode="json", exclude={"activations": {"device"}}),
            self.leaderboard(),
        )

    def commit(
        self,
        key: ArtifactKey,
        write: Callable[[Path], None],
        provenance: Mapping[str, Any],
        upstream: Sequence[ArtifactKey] = (),
        estimate_bytes: int = 0,
    ) -> Artifact:
        """Commit an artifact of this plan; its manifest also gets code version and config slice.

        Arguments and errors are those of `Store.commit`.
        """
        return self.store.commit(
            key,
            write,
            provenance=provenance,
            upstream=upstream,
            estimate_bytes=estimate_bytes,
            code_version=CODE_VERSIONS[key.stage],
            config=self._configs[key],
        )

    def _key(
        self,
        stage: str,
        partition: tuple[str, ...],
        config: Mapping[str, Any],
        *upstream: ArtifactKey,
    ) -> ArtifactKey:
        upstream_prints = [key.fingerprint for key in upstream]
        key = ArtifactKey(
            stage, partition, fingerprint(stage, CODE_VERSIONS[stage], config, upstream_prints)
        )
        self._configs[key] = config
        return key
