"""How stable a ranking is, and what choosing fold by fold is worth, where the truth is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from taprobe_core.sweep.boards import sweep_leaderboard
from taprobe_core.sweep.recipes import Configuration
from taprobe_core.sweep.shortlist import sweep_choices
from taprobe_core.sweep.stability import rank_correlation, skill_matrix, sweep_stability, winner
from taprobe_core.tables.contract import schema_of
from taprobe_core.tables.sweep import SWEEP_CONFIGURATIONS, SWEEP_RECIPES

UNITS = dict.fromkeys(("model", "setting", "recipe", "protocol", "split"), pl.String)
UNITS |= {"layer": pl.Int64, "fold": pl.Int32, "primary": pl.Float64}
UNITS |= dict.fromkeys(("seed", "problem_id", "n_sentences", "n_anchors"), pl.Int64)

Level = Callable[[Configuration, str, int, int], float | None]
"""Configuration, split, problem, seed -> value."""

CONFIGURATIONS = [
    Configuration(
        stage="stage1",
        model="m",
        layer=layer,
        setting=setting,
        target="importance_signed",
        pooling=pooling,
    )
    for setting in ("a", "b")
    for layer in range(5)
    for pooling in ("mean", "tokens")
]


def quality(each: Configuration) -> float:
    """What a configuration is worth, whatever its setting."""
    return 0.05 * each.layer + (0.02 if each.pooling == "tokens" else 0.0)


def sheets() -> tuple[pl.DataFrame, pl.DataFrame]:
    """One candidate per configuration; those of tokens depend on the seed."""
    configurations = [
        {name: getattr(each, name) for name in ("stage", "model", "layer", "setting", "target")}
        | {"drop_last_sentence": True, "pooling": each.pooling, "residualize": "none"}
        | {"config_id": each.id, "factors": json.dumps(each.factors)}
        for each in CONFIGURATIONS
    ]
    recipes = [
        {"stage": each.stage, "config_id": each.id, "model": "m", "layer": each.layer}
        | {"setting": each.setting, "kind": "k", "role": "candidate", "residualize": "none"}
        | {"recipe": each.pooling, "target": "importance_signed"}
        for each in CONFIGURATIONS
    ]
    return (
        pl.DataFrame(configurations, schema_of(SWEEP_CONFIGURATIONS)),
        pl.DataFrame(recipes, schema_of(SWEEP_RECIPES)),
    )


def results_of(level: Level, *, n_problems: int = 10, n_seeds: int = 3) -> pl.DataFrame:
    rows = [
        {"model": "m", "layer": each.layer, "setting": each.setting, "recipe": each.pooling}
        | {"protocol": "lopo", "fold": fold, "split": split, "seed": seed, "problem_id": problem}
        | {"primary": level(each, split, problem, seed), "n_sentences": 9, "n_anchors": 0}
        for each in CONFIGURATIONS
        for seed in range(n_seeds if each.pooling == "tokens" else 1)
        for fold in range(n_problems)
        for split, problem in (("val", (fold + 1) % n_problems), ("test", fold))
    ]
    return pl.DataFrame(rows, UNITS)


def stability(results: pl.DataFrame, **options: Any) -> dict[str, dict[str, Any]]:
    board = sweep_leaderboard(*sheets(), results, protocol="lopo")
    found = sweep_stability(board, sheets()[1], results, protocol="lopo", **options)
    return {row["source"]: row for row in found.to_dicts()}


def choices(results: pl.DataFrame) -> dict[str, dict[str, Any]]:
    found = sweep_choices(*sheets(), results, protocol="lopo")
    return {row["setting"]: row for row in found.to_dicts()}


@given(
    hnp.arrays(np.float64, (4, 5), elements=st.floats(-1, 1)),
    hnp.arrays(np.bool_, (4, 5)),
    hnp.arrays(np.float64, (3, 5), elements=st.integers(0, 3).map(float)),
)
def test_skills_under_weights_are_those_of_repeated_problems(
    value: np.ndarray, is_defined: np.ndarray, weights: np.ndarray
) -> None:
    rows = [
        {
            "config_id": f"c{i}",
            "problem_id": j,
            "primary": value[i, j] if is_defined[i, j] else None,
            "chance": j / 10 if is_defined[i, j] else None,
        }
        for i in range(4)
        for j in range(5)
    ]
    schema = {
        "config_id": pl.String,
        "problem_id": pl.Int64,
        "primary": float,
        "chance": float,
    }
    found = skill_matrix(pl.DataFrame(rows, schema).sample(fraction=1, shuffle=True, seed=1))
    got = found.skill(weights)
    for draw in range(3):
        for i in range(4):
            drawn = [
                (value[i, j] - j / 10, 1 - j / 10)
                for j in range(5)
                if is_defined[i, j]
                for _ in range(int(weights[draw, j]))
            ]
            if not drawn:
                assert np.isnan(got[draw, i])
            else:
                above, ceiling = np.array(drawn).T
                assert got[draw, i] == pytest.approx(above.mean() / ceiling.mean(), abs=1e-12)


@given(hnp.arrays(np.float64, (2, 7), elements=st.integers(-3, 3).map(float)))
def test_rank_correlation_is_scipy_s_and_nan_for_a_constant(pair: np.ndarray) -> None:
    left, right = pair
    found = rank_correlation(left, right)
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)
    gaps = np.where(np.arange(7) < 5, np.nan, left)
    assert np.isnan(rank_correlation(gaps, right))


def test_a_skill_that_is_not_defined_never_wins() -> None:
    nan = np.nan
    skills = np.array([[nan, -5.0, nan], [nan, nan, nan], [1.0, 1.0, nan], [nan, 2.0, 3.0]])
    assert winner(skills).tolist() == [1, -1, 0, 2]


def test_without_noise_every_ranking_is_the_same() -> None:
    found = stability(results_of(lambda each, *_: quality(each)), n_draws=20)

    assert set(found) == {"seeds", "halves", "settings", "validation_test", "bootstrap"}
    for source, row in found.items():
        assert row["rank_correlation"] == pytest.approx(1.0), source
        assert row["rank_correlation_low"] == pytest.approx(1.0), source
        assert row["p_winner_changes"] == 0, source
        assert row["n_winners"] == 1, source
    assert [found[name]["n_configurations"] for name in ("halves", "settings")] == [20, 10]
    counts = {name: row["n_comparisons"] for name, row in found.items()}
    assert counts == {
        "seeds": 3,
        "halves": 20,
        "settings": 1,
        "validation_test": 1,
        "bootstrap": 20,
    }
    assert found["seeds"]["mean_sd"] == pytest.approx(0)


def test_a_setting_that_turns_the_order_round_is_seen_in_settings_alone() -> None:
    found = stability(
        results_of(lambda each, *_: quality(each) * (1 if each.setting == "a" else -1)), n_draws=20
    )
    assert found["settings"]["rank_correlation"] == pytest.approx(-1)
    assert found["settings"]["p_winner_changes"] == 1
    assert found["settings"]["n_winners"] == 2
    assert found["halves"]["rank_correlation"] == pytest.approx(1)


def test_validation_that_says_the_opposite_of_test_is_seen() -> None:
    found = stability(
        results_of(lambda each, split, *_: quality(each) * (1 if split == "val" else -1)), n_draws=5
    )
    assert found["validation_test"]["rank_correlation"] == pytest.approx(-1)
    assert found["validation_test"]["p_winner_changes"] == 1


def test_noise_of_problems_is_seen_in_halves_and_resamples() -> None:
    rng = np.random.default_rng(3)
    found = stability(results_of(lambda *_: float(rng.standard_normal())), n_draws=100)

    assert abs(found["halves"]["rank_correlation"]) < 0.25
    assert found["halves"]["p_winner_changes"] > 0.6
    assert 0.3 < found["bootstrap"]["p_winner_changes"] < 1
    assert found["bootstrap"]["n_winners"] > 2
    assert found["bootstrap"]["mean_sd"] > 0.1


def test_noise_of_seeds_moves_seeds_and_what_does_not_depend_on_them_stands_still() -> None:
    rng = np.random.default_rng(4)
    noise = {
        key: rng.standard_normal() for key in [(e.id, s) for e in CONFIGURATIONS for s in range(3)]
    }
    found = stability(
        results_of(lambda each, _s, _p, seed: float(noise[each.id, seed])), n_draws=20
    )
    steady = np.std(
        [
            [noise[e.id, s] if e.pooling == "tokens" else noise[e.id, 0] for s in range(3)]
            for e in CONFIGURATIONS
        ],
        axis=1,
        ddof=1,
    )
    assert found["seeds"]["mean_sd"] == pytest.approx(steady.mean())
    assert found["seeds"]["rank_correlation"] < 0.95
    assert found["halves"]["rank_correlation"] == pytest.approx(1)


def test_the_same_seed_gives_the_same_table_and_another_does_not() -> None:
    rng = np.random.default_rng(5)
    results = results_of(lambda *_: float(rng.standard_normal()))
    first, again, other = (stability(results, n_draws=30, seed=seed) for seed in (1, 1, 2))

    assert first == again
    assert first["halves"] != other["halves"]


def test_one_problem_and_one_seed_leave_most_of_it_undefined() -> None:
    found = stability(
        results_of(lambda each, *_: quality(each), n_problems=1, n_seeds=1), n_draws=5
    )
    assert found["seeds"]["n_comparisons"] == 0
    assert found["seeds"]["rank_correlation"] is None
    assert found["seeds"]["mean_sd"] is None
    assert found["halves"]["n_comparisons"] == 0
    assert found["bootstrap"]["rank_correlation"] == pytest.approx(1)


def test_undefined_configurations_are_left_out() -> None:
    found = stability(results_of(lambda each, *_: quality(each) if each.layer else None), n_draws=5)
    assert found["halves"]["n_configurations"] == 16
    assert found["halves"]["rank_correlation"] == pytest.approx(1)
    board = sweep_leaderboard(*sheets(), results_of(lambda *_: None), protocol="lopo")
    nothing = results_of(lambda *_: None)
    assert sweep_stability(board, sheets()[1], nothing, protocol="lopo").is_empty()


def test_a_fold_chooses_by_its_own_validation_problems_alone() -> None:
    rng = np.random.default_rng(6)
    table = {
        (each.id, split, problem): float(rng.standard_normal())
        for each in CONFIGURATIONS
        for split in ("val", "test")
        for problem in range(10)
    }
    found = choices(results_of(lambda each, split, problem, _: table[each.id, split, problem]))
    for setting in ("a", "b"):
        mine = [each for each in CONFIGURATIONS if each.setting == setting]
        chosen = [
            max(mine, key=lambda each, p=(fold + 1) % 10: table[each.id, "val", p])
            for fold in range(10)
        ]
        tested = [table[each.id, "test", fold] for fold, each in enumerate(chosen)]
        alone = [np.mean([table[each.id, "test", p] for p in range(10)]) for each in mine]
        row = found[setting]
        assert row["skill"] == pytest.approx(np.mean(tested))
        assert row["best_skill"] == pytest.approx(max(alone))
        assert (row["n_candidates"], row["n_folds"]) == (10, 10)
        assert row["n_chosen"] == len(set(chosen))


def test_choosing_among_noise_earns_nothing_while_the_best_on_test_seems_good() -> None:
    rng = np.random.default_rng(8)
    found = choices(results_of(lambda *_: float(rng.standard_normal())))

    for row in found.values():
        assert abs(row["skill"]) < 1
        assert row["best_skill"] > 0.3
        assert row["best_skill"] > row["skill"]


def test_a_clear_winner_is_chosen_by_every_fold() -> None:
    found = choices(results_of(lambda each, *_: quality(each)))
    for row in found.values():
        assert row["n_chosen"] == 1
        assert row["most_chosen"] == "m@L4 tokens"
        assert row["skill"] == row["best_skill"] == pytest.approx(0.22)


def test_folds_without_validation_choose_nothing() -> None:
    results = results_of(lambda each, *_: quality(each))
    assert not choices(results.filter(pl.col("split") == "test"))
    assert not choices(results.clear())
