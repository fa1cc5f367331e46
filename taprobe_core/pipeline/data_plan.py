"""Keys of what a study reads: rollouts, labels, spans, activations, attention.

A key is a hash of the stage's code version, the slice of the study that the stage depends on and
the keys upstream of it. What is concluded from these belongs in `plan`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from taprobe_core.keys import Site
from taprobe_core.pipeline.keyed import KeyedSources
from taprobe_core.rollouts.parse import SHARES
from taprobe_core.store import ArtifactKey
from taprobe_core.study import SPEED_ONLY


class DataPlan(KeyedSources):
    """Keys of one study's data in one store; arguments are those of `KeyedSources`."""

    @cache
    def rollouts(self, model: str, setting: str) -> ArtifactKey:
        """Key of the rollout tables of one model and setting.

        Where the label is a measure that is not read otherwise, it decides which are sound.
        """
        rollouts, field = self.study.rollouts, self.study.labels.field
        return self._key(
            "rollouts",
            (model, setting),
            {
                "content": self.dataset_version(model, setting),
                "rollouts_dir": self.model(model).rollouts_dir,
                "setting": setting,
                "on_bad_problem": rollouts.on_bad_problem,
                **({} if field == SHARES[-1] else {"label_field": field}),
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
        """Key of the texts and spans of one model and setting.

        The model's context decides which texts are too long.
        """
        tokenizer_sha256 = self.checkpoint(model)["tokenizer_sha256"]
        n_positions = self.context_length(model)
        return self._key(
            "spans",
            (model, setting),
            {
                **self.study.spans.model_dump(mode="json"),
                "tokenizer_sha256": tokenizer_sha256,
                "special_tokens": self.special_tokens(model),
                "on_bad_problem": self.study.rollouts.on_bad_problem,
                **({} if n_positions is None else {"n_positions": n_positions}),
            },
            self.rollouts(model, setting),
        )

    def _computed_in(self, site: Site) -> dict[str, Any]:
        model = self.model(site.model)
        chosen = model.attn_implementation
        attention = {"attn_implementation": chosen} if chosen != "sdpa" else {}
        return {"dtype": model.dtype, **attention}

    def _activation_config(self, site: Site) -> dict[str, Any]:
        return {
            "checkpoint": dict(self.checkpoint(site.model)),
            "layer": site.layer,
            **self._computed_in(site),
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
            **self._computed_in(site),
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
                "folds": self.folds_config(),
            },
            *(self.vertical_attention(site, setting) for site in self.sites(model)),
        )

    def folds_config(self) -> dict[str, Any]:
        """What decides the folds of every cell."""
        return {
            "problem_ids": list(self.problem_ids()),
            **self.study.splits.model_dump(mode="json"),
        }
