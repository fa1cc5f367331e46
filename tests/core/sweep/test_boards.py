"""Ranking configurations, shortlists and comparisons, on results whose truth is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pytest

from taprobe_core.errors import NotEnoughDataError
from taprobe_core.evaluation.intervals import sign_flip_p
from taprobe_core.evaluation.summary import chance_pr_auc
from taprobe_core.metrics import primary_metric
from taprobe_core.study import Evaluation, load_study
from taprobe_core.study.sweep import Shortlists
from taprobe_core.sweep.boards import (
    configuration_table,
    measured,
    recipe_table,
    recipe_values,
    sweep_leaderboard,
    sweep_paired_deltas,
)
from taprobe_core.sweep.shortlist import shortlist
from taprobe_core.sweep.space import SweepSpace
from taprobe_core.tables.contract import schema_of
from taprobe_core.tables.results import CONTRASTS, PROTOCOLS
from taprobe_core.tables.sweep import SWEEP_LEADERBOARD

UNITS = {
    "model": pl.String,
    "layer": pl.Int64,
    "setting": pl.String,
    "recipe": pl.String,
    "protocol": pl.Enum(PROTOCOLS),
    "fold": pl.Int32,
    "split": pl.String,
    "seed": pl.Int64,
    "problem_id": pl.Int64,
    "primary": pl.Float64,
    "n_sentences": pl.Int64,
    "n_anchors": pl.Int64,
}
PLACE = ["model", "layer", "setting"]
Level = Callable[[dict[str, Any], str], float | None]


@cache
def space() -> SweepSpace:
    study = load_study("demo_sweep", environ={})
    assert study.sweep is not None
    return SweepSpace(study.sweep, study)


@cache
def tables() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Configurations and recipes of stage 1 of the demo sweep."""
    stage1 = space().stage1()
    return configuration_table(space(), stage1), recipe_table(space(), stage1)


def fits() -> pl.DataFrame:
    """Every recipe at its place."""
    return tables()[1].unique([*PLACE, "recipe"], keep="first", maintain_order=True)


def results_of(
    recipes: pl.DataFrame, level: Level, *, n_problems: int = 8, n_seeds: int = 1, noise: float = 0
) -> pl.DataFrame:
    """Units whose skill is `level(recipe, split)`; None is undefined. Fold f tests problem f."""
    rng = np.random.default_rng(0)
    chance = chance_pr_auc(20, 2)
    rows = []
    for recipe in recipes.iter_rows(named=True):
        low = chance if primary_metric(recipe["target"]) == "pr_auc" else 0
        is_stochastic = recipe["kind"] in ("mlp_probe", "attention_probe", "multimax_probe")
        for seed in range(n_seeds if is_stochastic else 1):
            for fold in range(n_problems):
                for split, problem in (("val", (fold + 1) % n_problems), ("test", fold)):
                    at = level(recipe, split)
                    skill = None if at is None else at + noise * rng.standard_normal()
                    rows.append(
                        {name: recipe[name] for name in (*PLACE, "recipe")}
                        | {"protocol": "lopo", "fold": fold, "split": split, "seed": seed}
                        | {"problem_id": problem, "n_sentences": 20, "n_anchors": 2}
                        | {"primary": None if skill is None else low + skill * (1 - low)}
                    )
    return pl.DataFrame(rows, UNITS)


def score(recipe: dict[str, Any]) -> float:
    """A made-up quality that differs between all recipes and places."""
    text = json.dumps([recipe[name] for name in (*PLACE, "recipe")])
    return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 16**6


def board(results: pl.DataFrame, **options: Any) -> pl.DataFrame:
    return sweep_leaderboard(*tables(), results, protocol="lopo", **options)


def values_of(rows: list[dict[str, Any]], target: str) -> pl.DataFrame:
    shared = {"model": "m", "layer": 0, "setting": "s", "protocol": "lopo", "fold": 0}
    units = pl.DataFrame([shared | row for row in rows], UNITS)
    recipes = units.select("recipe", pl.lit(target).alias("target")).unique()
    return recipe_values(measured(units, recipes, "lopo")).sort("recipe")


def test_skill_is_the_share_of_the_way_from_chance_to_a_perfect_ranking() -> None:
    sizes = [(10, 1), (20, 4), (30, 3)]
    value = [0.5, 0.6, 0.7]
    rows = [
        {"recipe": "r", "fold": i, "split": split, "seed": seed, "problem_id": i}
        | {"primary": value[i] + shift, "n_sentences": n, "n_anchors": k}
        for i, (n, k) in enumerate(sizes)
        for split in ("val", "test")
        for seed, shift in ((0, -0.1), (1, 0.1))
    ]
    found = values_of(rows, "anchor_binary")

    chance = np.array([chance_pr_auc(n, k) for n, k in sizes])
    skill = (np.array(value) - chance).sum() / (1 - chance).sum()
    assert found["test_skill"][0] == pytest.approx(skill)
    assert found["test_value"][0] == pytest.approx(0.6)
    assert found["test_chance"][0] == pytest.approx(chance.mean())
    assert found["test_seed_sd"][0] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert found.select("n_problems", "n_undefined", "n_seeds").row(0) == (3, 0, 2)


def test_a_random_ranking_has_no_skill_at_any_base_rate() -> None:
    rows = [
        {"recipe": f"r{k}", "split": "test", "seed": 0, "problem_id": 0}
        | {"primary": chance_pr_auc(40, k), "n_sentences": 40, "n_anchors": k}
        for k in (2, 4, 6)
    ]
    found = values_of(rows, "anchor_binary")

    assert found["test_skill"].to_list() == pytest.approx([0, 0, 0])
    assert found["test_value"].n_unique() == 3
    assert not found["is_whole"].any()


def test_values_that_are_not_defined_are_counted_and_have_no_skill() -> None:
    cases = {"nan": float("nan"), "null": None, "sound": 0.5}
    for target in ("anchor_binary", "importance_signed"):
        rows = [
            {"recipe": name, "split": "test", "seed": 0, "problem_id": 0}
            | {"primary": value, "n_sentences": 9, "n_anchors": 3}
            for name, value in cases.items()
        ]
        found = values_of(rows, target)
        assert [each is None for each in found["test_skill"]] == [True, True, False]
        assert found["n_undefined"].to_list() == [1, 1, 0]
        assert found["test_value"].to_list() == [None, None, 0.5]


def test_a_fit_that_stands_twice_counts_once() -> None:
    results = results_of(fits(), lambda recipe, _: score(recipe), n_seeds=2, noise=0.1)
    part = results.filter(pl.col("fold") < 3)

    assert board(pl.concat([part, results])).equals(board(results))
    mine = contrasts_of(results)
    twice = pl.concat([mine.filter(pl.col("fold") < 3), mine])
    assert deltas(results, twice).equals(deltas(results))


def test_validation_chooses_the_kind_and_the_rank_and_test_decides_nothing() -> None:
    sound = board(results_of(fits(), lambda recipe, _: score(recipe)))
    # The test side turned round: the same order, other test values.
    turned = board(
        results_of(fits(), lambda recipe, split: score(recipe) * (1 if split == "val" else -1))
    )
    assert sound["config_id"].to_list() == turned["config_id"].to_list()
    assert sound["kind"].to_list() == turned["kind"].to_list()
    assert sound["test_skill"].to_list() == pytest.approx((-turned["test_skill"]).to_list())

    configurations, recipes = tables()
    best = {
        config: max(
            (score(row), row["kind"])
            for row in recipes.filter(config_id=config, role="candidate").iter_rows(named=True)
        )
        for config in configurations["config_id"]
    }
    assert {row["config_id"]: row["kind"] for row in sound.to_dicts()} == {
        config: kind for config, (_, kind) in best.items()
    }
    for (_, _), block in sound.group_by("stage", "target"):
        assert block["rank"].to_list() == list(range(1, 17))
        order = sorted(block["config_id"], key=lambda each: (-best[each][0], each))
        assert block["config_id"].to_list() == order
        assert block["n_tried"].to_list() == [16] * 16


def test_the_earlier_rule_ranks_on_test() -> None:
    results = results_of(
        fits(), lambda recipe, split: score(recipe) * (-1 if split == "val" else 1)
    )
    found = board(results, rank_by="test_primary")

    assert (found["score"] == found["test_value"]).all()
    for _, block in found.group_by("target"):
        assert block["test_value"].is_sorted(descending=True)
    assert found["config_id"].to_list() != board(results)["config_id"].to_list()


def test_rank_within_alike_configurations_does_not_see_differences_between_groups() -> None:
    def level(recipe: dict[str, Any], shift: float) -> float:
        return score(recipe) / 3 + shift * float(recipe["setting"] == "correct_base_solution")

    near = board(results_of(fits(), lambda r, _: level(r, 0.0)), rank_by="validation_rank")
    far = board(results_of(fits(), lambda r, _: level(r, 0.5)), rank_by="validation_rank")
    by_id = [frame.sort("config_id")["score"].to_list() for frame in (near, far)]

    assert by_id[0] == by_id[1]
    # Two layers x two poolings compete in each group.
    assert set(by_id[0]) == {0.875, 0.625, 0.375, 0.125}
    skill = [
        board(results_of(fits(), lambda r, _, s=shift: level(r, s)))["setting"].head(8).n_unique()
        for shift in (0.0, 0.5)
    ]
    assert skill == [2, 1]


def test_a_missing_recipe_or_side_makes_its_configurations_missing() -> None:
    whole = results_of(fits(), lambda recipe, _: score(recipe))
    lost = fits().filter(pl.col("kind") == "linear_probe").row(0, named=True)
    is_lost = pl.all_horizontal(pl.col(name) == lost[name] for name in (*PLACE, "recipe"))
    asking = tables()[1].filter(is_lost)["config_id"]

    for partial in (whole.filter(~is_lost), whole.filter(~(is_lost & (pl.col("split") == "val")))):
        found = board(partial)
        missing = found.filter(pl.col("status") == "missing")
        assert set(missing["config_id"]) == set(asking)
        assert missing["rank"].null_count() == missing.height
        assert found.filter(pl.col("rank").is_not_null()).height == 32 - missing.height
    nothing = board(whole.clear())
    assert nothing.height == 32
    assert set(nothing["status"]) == {"missing"}
    assert set(nothing["n_tried"]) == {0}


def test_undefined_values_never_outrank_in_two_hundred_boards_of_sixty_rows() -> None:
    # Each of 200 targets is a board of its own. 30 % of its rows have a value; of the others some
    # are NaN, some null, some not there.
    rng = np.random.default_rng(7)
    n_boards, n_rows = 200, 60
    n = n_boards * n_rows
    value = rng.random(n)
    fate = rng.choice(["defined", "nan", "null", "missing"], n, p=[0.3, 0.3, 0.2, 0.2])
    first = tables()[0].head(1).drop("config_id", "target")
    pool = pl.DataFrame(
        {
            "config_id": [f"stage1-{i:012x}" for i in rng.permutation(n)],
            "target": [f"target_{i // n_rows:03d}" for i in range(n)],
        }
    ).join(first, how="cross", maintain_order="left")
    pool = pool.select(*tables()[0].columns)
    recipes = pool.select(
        *("stage", "config_id", *PLACE),
        pl.lit("linear_probe").alias("kind"),
        pl.lit("candidate").alias("role"),
        pl.lit("importance_signed").alias("target"),
        pl.lit("none").alias("residualize"),
        pl.concat_str(pl.lit("r"), "config_id").alias("recipe"),
    )
    said = pl.Series("value", value).to_frame().with_columns(pl.Series("fate", fate))
    sides = pl.DataFrame({"split": ["val", "test"]})
    results = (
        pl.concat([recipes, said], how="horizontal")
        .filter(pl.col("fate") != "missing")
        .with_columns(
            pl.when(pl.col("fate") == "nan")
            .then(float("nan"))
            .when(pl.col("fate") == "defined")
            .then(pl.col("value"))
            .alias("primary"),
            pl.lit("lopo", UNITS["protocol"]).alias("protocol"),
            pl.lit(0, pl.Int32).alias("fold"),
            *(pl.lit(9, pl.Int64).alias(name) for name in ("seed", "problem_id")),
            *(pl.lit(9, pl.Int64).alias(name) for name in ("n_sentences", "n_anchors")),
        )
        .join(sides, how="cross")
        .select(*UNITS)
    )
    found = sweep_leaderboard(pool, recipes, results, protocol="lopo")
    chosen = shortlist(found, "stage1", Shortlists(to_stage2=24))

    truth = {
        config: each
        for config, each, kind in zip(pool["config_id"], value, fate, strict=True)
        if kind == "defined"
    }
    assert found["target"].n_unique() == n_boards
    for _, block in found.group_by("target", maintain_order=True):
        mine = [each for each in block["config_id"] if each in truth]
        ranked = block.head(len(mine))
        assert ranked["config_id"].to_list() == sorted(mine, key=lambda each: -truth[each])
        assert ranked["rank"].to_list() == list(range(1, len(mine) + 1))
        assert block["rank"].null_count() == n_rows - len(mine)
    assert set(chosen["config_id"]) <= set(truth)
    assert chosen["score"].is_finite().all()
    assert chosen.height == sum(
        min(24, block["rank"].count()) for _, block in found.group_by("target")
    )


def test_ties_go_to_the_lower_id() -> None:
    found = board(results_of(fits(), lambda *_: 0.25))
    for _, block in found.group_by("target"):
        assert block["config_id"].to_list() == sorted(block["config_id"])


def test_a_duplicate_is_listed_with_its_values_and_without_a_rank() -> None:
    configurations, recipes = tables()
    twin, first = configurations["config_id"][1], configurations["config_id"][0]
    marked = configurations.with_columns(
        pl.when(pl.col("config_id") == twin).then(pl.lit(first)).alias("duplicate_of")
    )
    results = results_of(fits(), lambda recipe, _: score(recipe))
    found = sweep_leaderboard(marked, recipes, results, protocol="lopo")
    row = found.filter(config_id=twin).row(0, named=True)

    assert row["rank"] is None
    assert row["status"] == "done"
    assert row["test_value"] is not None
    assert twin not in shortlist(found, "stage1", Shortlists())["config_id"].to_list()
    assert row["n_tried"] == 15


def test_stage_two_takes_the_best_of_each_target() -> None:
    found = board(results_of(fits(), lambda recipe, _: score(recipe)))
    chosen = shortlist(found, "stage1", Shortlists(to_stage2=3))

    assert chosen["target"].to_list() == ["anchor_binary", "importance_abs"] * 3
    assert chosen["target_rank"].to_list() == [1, 1, 2, 2, 3, 3]
    assert chosen["rank"].to_list() == [1, 2, 3, 4, 5, 6]
    expected = found.filter(pl.col("rank") <= 3).sort("rank", "target")
    assert chosen["config_id"].to_list() == expected["config_id"].to_list()
    assert "1 of 16 by validation_skill" in chosen["reason"][0]
    assert space().stage2(chosen)[0].attention == "off"


def stage_two_board(values: dict[str, list[float]]) -> pl.DataFrame:
    """A board of stage 2 with these scores by target."""
    schema = schema_of(SWEEP_LEADERBOARD)
    rows = [
        {"stage": "stage2", "target": target, "rank": rank, "config_id": f"{target}-{rank}"}
        | {"status": "done", "n_tried": len(scores), "kind": "linear_probe", "recipe": "r"}
        | {"protocol": "lopo", "score": value, "factors": "{}"}
        for target, scores in values.items()
        for rank, value in enumerate(sorted(scores, reverse=True), start=1)
    ]
    return pl.DataFrame(rows, schema)


def test_finalists_of_different_metrics_are_not_compared_unless_asked() -> None:
    values = {"anchor_binary": [0.2] * 12, "importance_abs": [0.3, 0.35, 0.4] * 5}
    taken = {
        rank_by: shortlist(
            stage_two_board(values), "stage2", Shortlists(rank_by=rank_by, to_stage3=12)
        )["target"].to_list()
        for rank_by in ("validation_skill", "test_primary")
    }
    assert taken["validation_skill"] == ["anchor_binary", "importance_abs"] * 6
    # The earlier rule: correlations of .3 displace every precision of .2.
    assert taken["test_primary"] == ["importance_abs"] * 12


def test_targets_with_few_configurations_leave_their_turns_to_others() -> None:
    found = shortlist(
        stage_two_board({"anchor_binary": [0.1], "importance_abs": [0.3] * 9}),
        "stage2",
        Shortlists(to_stage3=4),
    )
    assert found["target"].to_list() == ["anchor_binary"] + ["importance_abs"] * 3


def test_a_shortlist_of_nothing_says_what_to_do() -> None:
    with pytest.raises(NotEnoughDataError, match="none of 32 configurations has a rank"):
        shortlist(board(results_of(fits(), lambda *_: None)), "stage1", Shortlists())
    with pytest.raises(NotEnoughDataError, match="stage2 of the sweep"):
        shortlist(board(results_of(fits(), lambda *_: 0.1)), "stage2", Shortlists())


def test_a_shortlist_says_how_many_were_not_there() -> None:
    whole = results_of(fits(), lambda recipe, _: score(recipe))
    lost = fits().filter(pl.col("recipe").str.starts_with("multimax")).row(0, named=True)
    is_lost = pl.all_horizontal(pl.col(name) == lost[name] for name in (*PLACE, "recipe"))
    chosen = shortlist(board(whole.filter(~is_lost)), "stage1", Shortlists(to_stage2=2))

    missing = dict(chosen.select("target", "n_missing").iter_rows())
    assert sum(missing.values()) > 0
    assert any("not there to compare" in reason for reason in chosen["reason"])


def contrasts_of(results: pl.DataFrame, said: float = 0.1) -> pl.DataFrame:
    """Candidates beside their baselines; a baseline is worth `said` as a score of residuals."""
    recipes = tables()[1]
    pairs = (
        recipes.filter(role="candidate")
        .join(
            recipes.filter(role="baseline").select("config_id", baseline="recipe"), on="config_id"
        )
        .unique([*PLACE, "recipe", "baseline"], maintain_order=True)
    )
    key = [*PLACE, "protocol", "fold", "problem_id"]
    values = (
        results.filter(split="test")
        .group_by(*key, "recipe", maintain_order=True)
        .agg(value=pl.col("primary").mean())
    )
    other = values.rename({"recipe": "baseline", "value": "baseline_value"})
    is_plain = pl.col("residualize") == "none"
    return (
        pairs.join(values, on=[*PLACE, "recipe"])
        .join(other, on=[*key, "baseline"])
        .with_columns(
            pl.when(is_plain).then("baseline_value").otherwise(said).alias("baseline_value")
        )
        .select(*PLACE, *CONTRASTS.columns)
    )


def deltas(results: pl.DataFrame, contrasts: pl.DataFrame | None = None) -> pl.DataFrame:
    return sweep_paired_deltas(
        *tables(),
        results,
        contrasts_of(results) if contrasts is None else contrasts,
        protocol="lopo",
        evaluation=Evaluation(n_bootstrap=200),
    )


def test_candidates_are_compared_with_the_baselines_of_their_own_configuration() -> None:
    results = results_of(fits(), lambda recipe, _: score(recipe), noise=0.05)
    found = deltas(results).filter(~pl.col("recipe").is_in(residual_names()))
    configurations, recipes = tables()
    test = results.filter(pl.col("split") == "test")

    n_plain = recipes.filter(role="candidate", residualize="none").height
    assert found.height == 2 * n_plain
    row = found.row(17, named=True)
    place = configurations.filter(config_id=row["config_id"]).select(PLACE).row(0, named=True)
    base = recipes.filter(config_id=row["config_id"], kind=row["baseline"])["recipe"][0]
    own, other = (
        test.filter(recipe=name, **place)
        .group_by("problem_id")
        .agg(pl.col("primary").mean())
        .sort("problem_id")["primary"]
        .to_numpy()
        for name in (row["recipe"], base)
    )
    assert row["delta"] == pytest.approx((own - other).mean())
    assert row["p_sign_flip"] == pytest.approx(sign_flip_p(own - other))
    assert row["n_better"] == (own > other).sum()


def test_residual_fits_are_compared_with_chance_and_with_what_baselines_say_of_residuals() -> None:
    results = results_of(fits(), lambda recipe, _: 0.25, noise=0.01)
    found = deltas(results).filter(pl.col("recipe").is_in(residual_names()))
    n_residual = tables()[1].filter(role="candidate").filter(pl.col("residualize") != "none").height

    chance = found.filter(baseline="chance").join(tables()[0].select("config_id"), on="config_id")
    level = chance_pr_auc(20, 2)
    expected = [
        0.25 * (1 - level if target == "anchor_binary" else 1) for target in chance["target"]
    ]
    assert chance.height == n_residual
    assert chance["delta"].to_list() == pytest.approx(expected, abs=0.02)
    assert chance["p_sign_flip"].max() == pytest.approx(2 / 2**8)
    for kind in ("position_baseline", "text_only_baseline"):
        beside = found.filter(baseline=kind)
        low = [level if target == "anchor_binary" else 0 for target in beside["target"]]
        expected = [each + 0.25 * (1 - each) - 0.1 for each in low]
        assert beside.height == n_residual
        assert beside["delta"].to_list() == pytest.approx(expected, abs=0.02)


def residual_names() -> list[str]:
    return tables()[1].filter(pl.col("residualize") != "none")["recipe"].unique().to_list()


def test_a_fit_that_configurations_share_is_one_test_of_the_family() -> None:
    results = results_of(fits(), lambda recipe, _: score(recipe), noise=0.05)
    found = deltas(results)
    distinct = found.unique(["recipe", "baseline", "delta"])

    assert set(found["n_tests"]) == {distinct["p_sign_flip"].count()}
    assert (found["p_holm"] >= found["q_bh"] - 1e-12).all()
    assert (found["q_bh"] >= found["p_sign_flip"] - 1e-12).all()


def test_deltas_of_nothing_are_an_empty_table() -> None:
    nothing = results_of(fits().head(1), lambda *_: 0.1).clear()
    assert deltas(nothing).is_empty()
