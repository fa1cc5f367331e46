"""Leaderboard and deferral plans of a part of the demo, as they were pinned.

The part has the recipes that need no luck (position, text, linear, residual), so every processor
gives the same numbers; they are compared to five decimals.

After a change that is meant to move results, write the pins anew and read their difference:

    python tests/core/pipeline/test_pinned_results.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl
import yaml
from polars.testing import assert_frame_equal

from taprobe_core.pipeline import cells_of, open_plan, run_stage, stages_of
from taprobe_core.study import parse_study

PINS = Path(__file__).parent
STUDY = Path(__file__).resolve().parents[3] / "studies" / "demo.yaml"
TABLES = ("leaderboard", "plans")


def part_of_the_demo() -> str:
    """The demo's first reasoner at two layers, eight problems, one seed."""
    study = yaml.safe_load(STUDY.read_text())
    study["rollouts"]["source"]["n_problems"] = 8
    study["models"] = {"tiny-qwen2": {**study["models"]["tiny-qwen2"], "layers": [1, 3]}}
    study |= {"seeds": [0], "activations": {"poolings": ["mean"]}, "attention": {"mode": "off"}}
    recipes = {each["name"]: each for each in study["probes"]["recipes"]}
    kept = ("position_baseline", "text_only_baseline", "linear_probe", "residual_linear_probe")
    study["probes"] = {"recipes": [recipes[name] for name in kept]}
    return yaml.safe_dump(study)


def results(folder: Path) -> dict[str, pl.DataFrame]:
    """Run the part and gather its leaderboard, and the plans of all its cells."""
    plan = open_plan(parse_study(part_of_the_demo(), "part.yaml"), folder)
    for stage in stages_of(plan.study):
        if stage != "study_report":
            list(run_stage(plan, stage, cells_of(plan.study, stage)))
    found = {}
    for table, stage in zip(TABLES, ("leaderboard", "deferral_plans"), strict=True):
        files = sorted(folder.glob(f"**/{stage}/**/{table}.parquet"))
        frames = [pl.read_parquet(file) for file in files]
        found[table] = pl.concat(frames).with_columns(
            pl.col(pl.Categorical, pl.Enum).cast(pl.String)
        )
    return found


def test_no_result_has_moved(tmp_path: Path) -> None:
    for table, found in results(tmp_path).items():
        pins = pl.read_ndjson(PINS / f"pinned_{table}.ndjson", schema=found.schema)
        assert_frame_equal(found, pins, abs_tol=1e-5, rel_tol=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for table, found in results(Path(folder)).items():
            found.write_ndjson(PINS / f"pinned_{table}.ndjson")
