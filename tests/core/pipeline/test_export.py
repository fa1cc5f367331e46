"""What a notebook does with results: every table as pandas and Arrow, a probe, an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import yaml
from sklearn.metrics import average_precision_score

from taprobe_core import tables
from taprobe_core.errors import ArtifactError, ConfigError
from taprobe_core.estimators import Probe
from taprobe_core.keys import parse_trial
from taprobe_core.pipeline import (
    export_study,
    open_plan,
    read_evaluation,
    read_probe_data,
    read_scores,
)
from taprobe_core.pipeline.export import EXPORTED, unit_of


def test_every_table_opens_in_pandas_and_arrow(built: Any) -> None:
    plan, n_opened = open_plan(built.study, built.data), 0
    for stage, outcomes in built.outcomes.items():
        for table in plan.stages[stage].tables:
            frame = plan.read(stage, outcomes[0][0], table)
            in_pandas, in_arrow = frame.to_pandas(), frame.to_arrow()
            assert isinstance(in_pandas, pd.DataFrame)
            assert isinstance(in_arrow, pa.Table)
            assert list(in_pandas.columns) == in_arrow.column_names == frame.columns
            assert len(in_pandas) == in_arrow.num_rows == frame.height
            n_opened += 1
    assert n_opened >= 20
    site, setting = plan.study.sites[0], plan.study.settings[0]
    read = [read_scores(plan, site, parse_trial(f"{setting}@s01")), plan.store.usage()]
    for frame in (*read, *vars(read_evaluation(plan, site, setting)).values()):
        assert len(frame.to_pandas()) == frame.to_arrow().num_rows == frame.height


def test_a_probe_is_fitted_to_a_data_frame_of_activations(built: Any) -> None:
    plan = open_plan(built.study, built.data)
    site, setting = plan.study.sites[1], plan.study.settings[0]
    data = read_probe_data(plan, site.model, setting, site)
    states = pd.DataFrame(data.activations["mean"]).add_prefix("unit_")
    rows = data.labels.to_pandas()
    is_test = rows["problem_id"] == rows["problem_id"].max()
    probe = Probe().fit(
        states[~is_test], rows["is_anchor"][~is_test], groups=rows["problem_id"][~is_test]
    )
    assert probe.feature_names_in_[0] == "unit_0"
    # The study's own fit of this fold, on the problems that it trains on.
    (recipe,) = (each for each in plan.study.recipes if each.name == "linear_probe")
    scores = read_scores(plan, site, parse_trial(f"{setting}@s00"))
    own = scores.filter(recipe="linear_probe", split="test", problem_id=data.problems[-1])
    known = scores.filter(recipe="linear_probe", fold=own["fold"][0], split="val")["problem_id"]
    is_train = ~is_test & ~rows["problem_id"].isin(known.unique().to_list())
    mine = Probe(recipe).fit(states[is_train], rows["is_anchor"][is_train])
    np.testing.assert_allclose(
        mine.predict_proba(states[is_test])[:, 1], own["score"].to_numpy(), atol=1e-5
    )
    assert average_precision_score(rows["is_anchor"], probe.predict_proba(states)[:, 1]) > 0.5


@pytest.fixture(scope="module")
def exported(built: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "out"
    made = export_study(open_plan(built.study, built.data), folder)
    assert made.folder == folder
    assert not made.missing
    assert set(made.rows) == {each.name for each in EXPORTED}
    assert [each.name for each in folder.parent.iterdir()] == ["out"]
    return folder


@pytest.mark.parametrize("table", EXPORTED, ids=lambda table: table.name)
def test_an_export_holds_what_the_store_holds(exported: Path, built: Any, table: Any) -> None:
    plan = open_plan(built.study, built.data)
    arrow = ds.dataset(exported / table.name, partitioning="hive").to_table()
    frame = pd.read_parquet(exported / table.name)
    assert len(frame) == arrow.num_rows > 0
    assert set(frame.columns) == set(arrow.column_names) >= set(table.by)
    contract = getattr(tables, table.contract)
    wanted = {name for name, each in contract.columns.items() if not each.is_pattern}
    assert wanted <= set(arrow.column_names)
    assert arrow.schema.field("model").type == pa.string()
    assert set(arrow["model"].to_pylist()) == {"tiny"}
    assert set(arrow["setting"].to_pylist()) == set(plan.study.settings)
    if "layer" in table.by:
        assert arrow.schema.field("layer").type == pa.int32()
        assert set(arrow["layer"].to_pylist()) == {0, 1}
    if "seed" in table.by:
        assert set(arrow["seed"].to_pylist()) == {0, 1}
    key = [*contract.unique, *table.by]
    assert not frame.duplicated(list(dict.fromkeys(key))).any()


def test_values_are_those_of_the_store(exported: Path, built: Any) -> None:
    plan = open_plan(built.study, built.data)
    site, setting = plan.study.sites[1], plan.study.settings[1]
    part = ds.dataset(exported / "predictions", partitioning="hive").to_table(
        filter=(ds.field("layer") == site.layer)
        & (ds.field("setting") == setting)
        & (ds.field("seed") == 1)
    )
    scores = read_scores(plan, site, parse_trial(f"{setting}@s01"))
    np.testing.assert_array_equal(part["score"].to_numpy(), scores["score"].to_numpy())
    cell = (str(site), setting)
    kept = plan.read("evaluation", cell, "problem_metrics").filter(seed=1)
    units = pd.read_parquet(exported / "problem_metrics")
    units = units[(units["layer"] == site.layer) & (units["setting"] == setting)]
    units = units[units["seed"] == 1]
    np.testing.assert_array_equal(units["pr_auc"], kept["pr_auc"].to_numpy())


def test_the_readme_says_type_and_unit_of_every_column(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert text.startswith("# Export of study small\n")
    for table in EXPORTED:
        section = text.split(f"\n## {table.name}\n")[1].split("\n## ")[0]
        told = {line.split(" | ")[0].strip("| "): line for line in section.splitlines()}
        found = ds.dataset(exported / table.name, partitioning="hive").schema.names
        for name in found:
            assert unit_of(name), name
            assert unit_of(name) in told[name]
    assert "| is_positive | Boolean | yes |  | true or false |" in text
    assert "| accepted_error | Float64 | yes | 0 to 1 | share of sentences |" in text


def test_what_is_not_finished_is_named_and_costs_itself(
    built: Any, copied: Path, tmp_path: Path, taprobe: Callable[..., Any]
) -> None:
    values = yaml.safe_load(built.study.read_text())
    study = tmp_path / "more.yaml"
    study.write_text(yaml.safe_dump({**values, "seeds": [0, 1, 2]}))
    said = taprobe("export", study, "--to", tmp_path / "out", "--json")
    assert said.code == 2
    made = json.loads(said.out)
    assert "predictions tiny@L00/correct_base_solution@s02" in made["missing"]
    # The evaluation stands for all seeds of a setting, so that of three is another.
    assert set(made["rows"]) == {"predictions", "labels", "plans", "decisions"}
    assert (
        "predictions tiny@L00/correct_base_solution@s02: "
        in (tmp_path / "out" / "README.md").read_text()
    )
    shard = next((copied / "artifacts").rglob("scores.parquet"))
    shard.write_bytes(b"damaged")
    said = taprobe("export", built.study, "--to", tmp_path / "out")
    assert said.code == 2
    assert "the folder exists" in said.err
    said = taprobe("export", built.study, "--to", tmp_path / "out", "--overwrite")
    assert said.code == 2
    assert "missing: predictions" in said.err
    seeds = ds.dataset(tmp_path / "out" / "plans", partitioning="hive").to_table()["seed"]
    assert set(seeds.to_pylist()) == {0, 1}
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_a_folder_that_is_no_export_is_never_overwritten(built: Any, tmp_path: Path) -> None:
    plan = open_plan(built.study, built.data)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(ConfigError, match="no earlier export"):
        export_study(plan, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"
    with pytest.raises(ArtifactError, match="cannot be written"):
        export_study(plan, tmp_path / "none" / "out")
    with pytest.raises(ConfigError, match="nothing to export"):
        export_study(open_plan(built.study, tmp_path / "empty"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_write_leaves_the_earlier_export(
    built: Any, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taprobe_core.pipeline import export

    before = sorted(path.name for path in exported.rglob("*"))

    def full(path: Path, frame: pl.DataFrame) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_table", full)
    with pytest.raises(ArtifactError, match="No space left"):
        export_study(open_plan(built.study, built.data), exported, overwrite=True)
    assert sorted(path.name for path in exported.rglob("*")) == before
    assert [each.name for each in exported.parent.iterdir()] == ["out"]
