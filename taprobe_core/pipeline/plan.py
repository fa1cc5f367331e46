"""From a study to the fingerprint of every artifact it will hold, before anything is computed.

A `Plan` answers one question for every stage and cell: under which key does, or will, its artifact
stand in the store? The key is a hash of the stage's code version, the slice of the study that the
stage depends on, and the keys upstream of it, so a plan costs no computation beyond hashing the
source files once. Finding what the study names belongs in `sources`, running the stages in the
other sibling modules.

    rollouts ─┬─ labels ───────────────────┐
              └─ spans ─┬─ activations ────┴─ fits ── probe_fits ── deferral_plans ─┐
                        │                                    └──────────────────────┴─ evaluation
                        └─ vertical_attention ── receiver_heads
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from taprobe_core.keys import Site, Trial
from taprobe_core.pipeline.sources import Sources
from taprobe_core.store import Artifact, ArtifactKey, Store, fingerprint
from taprobe_core.study import SPEED_ONLY, ProbeRecipe, Study

CODE_VERSIONS: Mapping[str, str] = {
    "rollouts": "2",
    "labels": "2",
    "spans": "1",
    "activation_shards": "2",
    "activations": "2",
    "attention_shards": "1",
    "vertical_attention": "1",
    "receiver_heads": "1",
    "fits": "1",
    "probe_fits": "1",
    "deferral_plans": "1",
    "evaluation": "2",
    "leaderboard": "1",
    "study_report": "2",
}
"""Raised by hand when a stage's results change; every fingerprint below it then changes too."""


class Plan(Sources):
    """Keys of one study's artifacts in one store.

    Args:
        study: the study.
        store: where the artifacts stand.
        data_root: folder for what is built beside the store.
    """

    def __init__(self, study: Study, store: Store, data_root: Path) -> None:
        super().__init__(study, data_root)
        self.store = store
        self._configs: dict[ArtifactKey, Mapping[str, Any]] = {}

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
            **self.study.activations.model_dump(mode="json", exclude=set(SPEED_ONLY)),
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

    def _attention_config(self, site: Site) -> dict[str, Any]:
        attention = self.study.attention
        return {
            "checkpoint": dict(self.checkpoint(site.model)),
            "layer": site.layer,
            "dtype": self.model(site.model).dtype,
            "mode": attention.mode,
            "last_n": attention.last_n if attention.mode == "light" else None,
        }

    def attention_shard(
        self, site: Site, setting: str, problem_id: int, input_sha256: str
    ) -> ArtifactKey:
        """Key of one problem's vertical attention: mass between its sentences, per head."""
        return self._key(
            "attention_shards",
            (str(site), setting, f"problem_{problem_id}"),
            {**self._attention_config(site), "input_sha256": input_sha256},
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
    def vertical_attention(self, site: Site, setting: str) -> ArtifactKey:
        """Key of the index of one site and setting's attention shards, and what follows from them.

        Only the mode `full` makes head by head figures, and only they depend on proximity and depth
        control.
        """
        attention = self.study.attention
        is_full = attention.mode == "full"
        return self._key(
            "vertical_attention",
            (str(site), setting),
            {
                **self._attention_config(site),
                "proximity": list(attention.proximity) if is_full else None,
                "depth_control": attention.depth_control if is_full else None,
            },
            self.spans(site.model, setting),
        )

    @cache
    def receiver_heads(self, model: str, setting: str) -> ArtifactKey:
        """Key of the receiver heads of one model and setting, chosen over all its sites."""
        attention = self.study.attention
        return self._key(
            "receiver_heads",
            (model, setting),
            {
                "proximity": list(attention.proximity),
                "depth_control": attention.depth_control,
                "n_receiver_heads": attention.n_receiver_heads,
                "splits": self.study.splits.model_dump(mode="json"),
            },
            *(self.vertical_attention(site, setting) for site in self.sites(model)),
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
            self.study.model_dump(mode="json", exclude={"activations": set(SPEED_ONLY)}),
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
            config=self.config_of(key),
        )

    def config_of(self, key: ArtifactKey) -> Mapping[str, Any]:
        """The slice of the study that a key of this plan stands for."""
        return self._configs[key]

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
