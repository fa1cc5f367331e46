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

from functools import cache

from taprobe_core.keys import Site, Trial
from taprobe_core.pipeline.data_plan import DataPlan
from taprobe_core.pipeline.keyed import CHECK_VERSIONS, CODE_VERSIONS
from taprobe_core.pipeline.view import WHOLE, View
from taprobe_core.store import ArtifactKey
from taprobe_core.study import SPEED_ONLY, ProbeRecipe
from taprobe_core.study.sweep import SWEEP_READS
from taprobe_core.tables import SWEEP_STAGES

__all__ = ["CODE_VERSIONS", "Plan"]


class Plan(DataPlan):
    """Keys of one study's artifacts in one store; arguments are those of `KeyedSources`."""

    @cache
    def fit(
        self, site: Site, setting: str, recipe: ProbeRecipe, seed: int, view: View = WHOLE
    ) -> ArtifactKey:
        """Key of one recipe's fits over all folds.

        A recipe that reads nothing of the model's states is shared by all sites of the model, and a
        deterministic one by all seeds: each is solved once.

        Args:
            site: model and layer.
            setting: the setting.
            recipe: one of `Study.recipes`, whose target is filled in.
            seed: of a stochastic recipe.
            view: which rows and scores it sees; a sweep varies them.
        """
        scope = str(site) if recipe.reads_activations else site.model
        name = f"{recipe.name}@s{seed:02d}" if recipe.is_stochastic else recipe.name
        return self._key(
            "fits",
            (scope, setting, name),
            {
                "recipe": recipe.content(),
                "tie_rule": self.study.labels.tie_rule,
                "folds": self.folds_config(),
                "seed": seed if recipe.is_stochastic else None,
                "keep": self.study.probes.keep,
                **self._precision(recipe.is_stochastic),
                **view.content(self.study.attention.mode),
            },
            *self.fit_inputs(site, setting, recipe),
        )

    def fit_inputs(self, site: Site, setting: str, recipe: ProbeRecipe) -> list[ArtifactKey]:
        """Keys of what a recipe's fits are computed from."""
        keys = [self.labels(site.model, setting), self.spans(site.model, setting)]
        if recipe.poolings_read:
            keys.append(self.activations(site, setting))
        if "vertical_attention" in recipe.features:
            keys.append(self.vertical_attention(site, setting))
        return keys

    @cache
    def probe_fits(self, site: Site, trial: Trial) -> ArtifactKey:
        """Key of the index of one site and trial's fits."""
        fits = [self.fit(site, trial.setting, recipe, trial.seed) for recipe in self.study.fitted]
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
                "recipes": [recipe.name for recipe in self.study.recipes],
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
            {
                **self.study.model_dump(mode="json", exclude={"activations": set(SPEED_ONLY)}),
                "checks": CHECK_VERSIONS,
            },
            self.leaderboard(),
        )

    @cache
    def sweep_fits(self, stage: str, site: Site, setting: str) -> ArtifactKey:
        """Key of what one stage of the sweep finds at one site and setting, over all seeds.

        The configurations of the later stages follow from a shortlist, so its key stands for them.
        """
        sweep = self.study.sweep
        return self._key(
            f"sweep_{stage}",
            (str(site), setting),
            {
                "sweep": None
                if sweep is None
                else sweep.model_dump(mode="json", include=SWEEP_READS[stage]),
                "recipes": [recipe.model_dump(mode="json") for recipe in self.study.recipes],
                "baselines": list(self.study.evaluation.baselines),
                "seeds": list(self.study.seeds),
                "folds": self.folds_config(),
                "keep": self.study.probes.keep,
                **self._precision(True),
            },
            *([self.sweep_shortlist(stage)] if stage != "stage1" else []),
            self.labels(site.model, setting),
            self.activations(site, setting),
            *(
                [self.vertical_attention(site, setting)]
                if stage != "stage1" and self.study.attention.mode != "off"
                else []
            ),
        )

    def _precision(self, is_read: bool) -> dict[str, str]:
        """What of it decides scores; nothing where products are exact."""
        precision = self.study.probes.precision
        return {"precision": precision} if is_read and precision != "float32" else {}

    @cache
    def sweep_shortlist(self, stage: str) -> ArtifactKey:
        """Key of the configurations that go on to a stage of the sweep."""
        before, sweep = {"stage2": "stage1", "stage3": "stage2"}[stage], self.study.sweep
        return self._key(
            f"sweep_shortlist_{stage}",
            (self.study.name,),
            {"shortlists": None if sweep is None else sweep.shortlists.model_dump(mode="json")},
            *self._sweep_cells(before),
        )

    @cache
    def sweep_table(self, name: str) -> ArtifactKey:
        """Key of a table over all stages of the sweep."""
        cells = [key for stage in SWEEP_STAGES for key in self._sweep_cells(stage)]
        study = self.study
        config = {
            "evaluation": study.evaluation.model_dump(mode="json"),
            "sweep": None if study.sweep is None else study.sweep.model_dump(mode="json"),
        }
        return self._key(name, (study.name,), config, *cells)

    def _sweep_cells(self, stage: str) -> list[ArtifactKey]:
        study = self.study
        return [
            self.sweep_fits(stage, site, setting)
            for site in study.sites
            for setting in study.settings
        ]
