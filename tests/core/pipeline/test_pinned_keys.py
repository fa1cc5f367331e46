"""Fingerprints of every cell and part of one study that has every stage, as they were pinned.

A fingerprint names a stored artifact, so one that moves costs everybody a recomputation. Nothing is
computed here: keys follow from the study and the names of its inputs.

After a change that is meant to move keys (a code version that was raised, say), write the pins anew
and read their difference:

    python tests/core/pipeline/test_pinned_keys.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from taprobe_core.pipeline import Plan, cells_of, key_of, open_plan, stages_of
from taprobe_core.study import ProbeRecipe, parse_study

RESIDUAL = ProbeRecipe(
    name="residual", features=("activations",), pooling="last", target="importance_abs",
    residualize="position",
)  # fmt: skip
"""As a sweep asks for it: in a study that has one, recipes name neither."""

PINS = Path(__file__).with_name("pinned_keys.json")

STUDY = """
name: pinned
rollouts:
  source: {kind: policy, n_problems: 4, n_rollouts: 4}
models:
  tiny:
    rollouts_dir: tiny
    checkpoint: {kind: stand_in, architecture: llama, n_layers: 2, d_model: 16}
    n_layers: 2
    dtype: float32
    layers: [0, 1]
  other:
    rollouts_dir: other
    checkpoint: {kind: stand_in, architecture: qwen2, n_layers: 2, d_model: 16}
    n_layers: 2
    dtype: bfloat16
    layers: [1]
    attn_implementation: eager
settings: [correct_base_solution, incorrect_base_solution]
seeds: [0, 1]
labels: {percentile: 70, drop_last_sentence: false}
activations: {poolings: [mean, last, tokens]}
attention: {mode: full, proximity: [2, 4]}
probes:
  recipes:
    - {name: position_baseline, features: [position]}
    - {name: text_only_baseline, features: [text]}
    - {name: linear_probe, features: [activations]}
    - {name: mlp_probe, features: [activations], estimator: mlp}
    - {name: multimax_probe, features: [tokens], estimator: multimax,
       token_probe: {width: 4, n_heads: 2, max_epochs: 2}}
    - {name: vertical_attention_plus_position, features: [vertical_attention, position]}
splits: {protocols: [lopo, holdout]}
evaluation: {n_bootstrap: 10, n_null: 0, selectivity: {recipes: [linear_probe, mlp_probe]}}
sweep:
  targets: [anchor_binary, importance_abs]
  percentiles: [70]
  residualize: [none, position]
  attention:
    - {mode: "off"}
    - {mode: light, last_n: 2}
    - {mode: full}
  tuning: {regularization: [0.1, 1.0], n_heads: [2], depth: [1], width: [4],
           learning_rate: [0.01], weight_decay: [0.0], training: [hard], window: [5]}
"""


def pinned(plan: Plan) -> dict[str, str]:
    """`stage/cell` -> fingerprint, of cells and of the parts that indexes list."""
    study = plan.study
    keys = [
        *(
            key_of(plan, stage, cell)
            for stage in stages_of(study)
            for cell in cells_of(study, stage)
        ),
        *(
            plan.fit(site, setting, recipe, seed)
            for site in study.sites
            for setting in study.settings
            for recipe in (*study.fitted, RESIDUAL)
            for seed in study.seeds
        ),
        *(
            plan.shard(kind, model, setting, 3, "sha256 of problem 3", [f"L00.{name}", "L01.last"])
            for kind, name in (("activation_shards", "mean"), ("attention_shards", "mass"))
            for model in study.models
            for setting in study.settings
        ),
    ]
    return {"/".join((key.stage, *key.partition)): key.fingerprint for key in keys}


def test_no_key_has_moved(tmp_path: Path) -> None:
    plan = open_plan(parse_study(STUDY, "pinned.yaml"), tmp_path)
    found, pins = pinned(plan), json.loads(PINS.read_text())
    assert {name.split("/")[0] for name in pins} == {
        *stages_of(plan.study), "fits", "activation_shards", "attention_shards",
    }  # fmt: skip
    assert sorted(found) == sorted(pins)
    assert {name: key for name, key in found.items() if key != pins[name]} == {}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = pinned(open_plan(parse_study(STUDY, "pinned.yaml"), folder))
    PINS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
