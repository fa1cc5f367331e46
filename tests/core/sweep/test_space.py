"""What a sweep expands to: the earlier system's numbers, ids that do not depend on order, roles."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taprobe_core.errors import ConfigError, DataError
from taprobe_core.study import ProbeRecipe, Study, TokenProbe, load_study, parse_study
from taprobe_core.study.sweep import ATTENTION_VARIANTS, AttentionVariant
from taprobe_core.sweep.boards import configuration_table, recipe_table
from taprobe_core.sweep.recipes import Configuration, configuration_id
from taprobe_core.sweep.space import SweepSpace, duplicates, recipes_of, uses_of

REFERENCE_KINDS = {
    "position_baseline",
    "text_only_baseline",
    "linear_probe",
    "mlp_probe",
    "activations_plus_position",
}


@cache
def shipped(name: str) -> SweepSpace:
    study = load_study(name, environ={})
    assert study.sweep is not None
    return SweepSpace(study.sweep, study)


def demo_with(**changes: Any) -> Study:
    """The demo sweep with parts changed; a mapping is merged, None removes a key."""
    values = load_study("demo_sweep", environ={}).model_dump(mode="json", exclude_unset=True)
    for name, change in changes.items():
        old = values[name]
        values[name] = {**old, **change} if isinstance(old, dict) else change
        if isinstance(old, dict):
            values[name] = {key: each for key, each in values[name].items() if each is not None}
    return parse_study(json.dumps(values), "demo_sweep.yaml")


def space_of(study: Study) -> SweepSpace:
    assert study.sweep is not None
    return SweepSpace(study.sweep, study)


def shortlist(*chosen: tuple[Configuration, str]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "rank": list(range(1, len(chosen) + 1)),
            "stage": [each.stage for each, _ in chosen],
            "factors": [json.dumps(each.factors) for each, _ in chosen],
            "kind": [kind for _, kind in chosen],
        }
    )


def roles(space: SweepSpace, configuration: Configuration) -> dict[tuple[str, str], str]:
    return {
        (use.kind, use.swept.template.residualize): use.role
        for use in uses_of(space, configuration)
    }


def test_stage_one_of_the_shipped_sweep_has_the_earlier_system_s_768_configurations() -> None:
    found = shipped("sweep").stage1()
    settings = ("correct_base_solution", "incorrect_base_solution")
    targets = [
        ("anchor_binary", percentile, drop)
        for percentile in (85.0, 90.0, 95.0)
        for drop in (True, False)
    ]
    targets += [("importance_abs", None, True), ("importance_signed", None, True)]  # type: ignore[list-item]
    brute = {
        (setting + forced, layer, pooling, residualize, *target)
        for setting, forced in product(settings, ("", "_forced_answer"))
        for layer in (12, 24, 36, 42)
        for pooling in ("mean", "tokens")
        for residualize in ("none", "position", "position_plus_text")
        for target in targets
    }
    assert len(found) == len({each.id for each in found}) == len(brute) == 768
    assert brute == {
        (
            *(each.setting, each.layer, each.pooling, each.residualize),
            *(each.target, each.percentile, each.drop_last_sentence),
        )
        for each in found
    }
    assert Counter(each.target for each in found) == {
        "anchor_binary": 576,
        "importance_abs": 96,
        "importance_signed": 96,
    }


def test_the_loop_of_the_earlier_system_and_its_distinct_fits_are_counted_again() -> None:
    space = shipped("sweep")
    asked = [(each, use.swept) for each in space.stage1() for use in uses_of(space, each)]
    distinct = {}
    for each, swept in asked:
        layer = each.layer if swept.template.reads_activations else None
        distinct[each.model, each.setting, layer, swept.name] = swept.template.is_stochastic
    assert set(recipes_of(space, space.stage1())) == {swept.name for _, swept in asked}
    n_folds, n_seeds = 20, 20
    assert len(asked) * n_folds * n_seeds == 2_252_800
    n_stochastic = sum(distinct.values())
    n_deterministic = len(distinct) - n_stochastic
    assert (n_stochastic * n_seeds + n_deterministic) * n_folds == 267_520
    assert n_deterministic * n_folds == 11_520
    loop = sum(not swept.template.is_stochastic for _, swept in asked)
    assert loop * n_folds * n_seeds == 1_433_600


def test_recipes_that_read_no_site_are_fitted_once_for_all_layers_poolings_and_residuals() -> None:
    space = shipped("sweep")
    recipes = recipe_table(space, space.stage1())
    position = recipes.filter(pl.col("kind") == "position_baseline")

    assert position.height == 768
    assert position.select("setting", "recipe").unique().height == 4 * 8


@given(st.permutations(range(8)), st.sampled_from(["stage1", "stage2", "stage3"]))
def test_an_id_does_not_depend_on_the_order_of_factors(order: list[int], stage: Any) -> None:
    factors = list(shipped("sweep").stage1()[0].factors.items())
    shuffled = dict(factors[index] for index in order)

    assert configuration_id(stage, shuffled) == configuration_id(stage, dict(factors))


@settings(suppress_health_check=[HealthCheck.too_slow])  # of a busy machine, not of the test
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(-9, 9) | st.text(max_size=3)),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(-9, 9) | st.text(max_size=3)),
)
def test_ids_are_equal_only_for_equal_factors(left: dict[str, Any], right: dict[str, Any]) -> None:
    same = configuration_id("stage1", left) == configuration_id("stage1", right)
    assert same == (left == right)


def test_an_id_is_the_stage_and_the_start_of_a_documented_hash() -> None:
    text = 'stage2:{"a":1,"b":"x"}'
    digest = hashlib.sha256(text.encode()).hexdigest()

    assert configuration_id("stage2", {"b": "x", "a": 1}) == f"stage2-{digest[:12]}"


def test_a_configuration_comes_back_from_its_factors_with_the_same_id() -> None:
    space = shipped("demo_sweep")
    first = space.stage1()[0]
    later = space.stage2(shortlist((first, "linear_probe")))
    last = space.stage3(shortlist((later[-1], "activations_plus_attention")))

    for each in (first, *later, *last):
        assert Configuration.of(each.stage, json.dumps(each.factors)) == each
    with pytest.raises(DataError, match="unknown factors"):
        Configuration.of("stage1", '{"depth": 3}')
    with pytest.raises(DataError, match="stage 'stage9'"):
        Configuration.of("stage9", "{}")


def test_stage_two_ids_do_not_depend_on_how_the_parent_was_reached() -> None:
    space = shipped("demo_sweep")
    parents = [(each, "linear_probe") for each in space.stage1()[:3]]
    forwards = {each.id for each in space.stage2(shortlist(*parents))}
    backwards = {each.id for each in space.stage2(shortlist(*parents[::-1]))}

    assert forwards == backwards
    assert len(forwards) == 3 * 5


def test_whole_numbers_written_for_percentiles_change_no_id() -> None:
    whole = space_of(demo_with(sweep={"percentiles": [90]})).stage1()
    broken = space_of(demo_with(sweep={"percentiles": [90.0]})).stage1()

    assert [each.id for each in whole] == [each.id for each in broken]


def test_a_mean_configuration_is_judged_by_pooled_kinds() -> None:
    space = shipped("sweep")
    plain = next(each for each in space.stage1() if each.pooling == "mean")
    assert plain.residualize == "none"

    found = roles(space, plain)
    assert {kind for kind, _ in found} == REFERENCE_KINDS
    assert found["position_baseline", "none"] == "baseline"
    assert found["activations_plus_position", "none"] == "candidate"
    residual = roles(space, replace(plain, residualize="position"))
    assert residual["linear_probe", "position"] == residual["mlp_probe", "position"] == "candidate"
    assert residual["linear_probe", "none"] == "companion"
    assert residual["activations_plus_position", "none"] == "companion"
    assert ("activations_plus_position", "position") not in residual


def test_a_token_configuration_keeps_its_baselines_and_is_judged_by_token_kinds() -> None:
    space = shipped("sweep")
    tokens = next(each for each in space.stage1() if each.pooling == "tokens")
    found = roles(space, tokens)

    assert found["attention_probe", "none"] == found["multimax_probe", "none"] == "candidate"
    assert found["position_baseline", "none"] == found["text_only_baseline", "none"] == "baseline"
    assert found["linear_probe", "none"] == "companion"


def test_configurations_judged_by_the_same_fits_are_named_as_duplicates() -> None:
    space = shipped("sweep")
    configurations = space.stage1()
    by_id = {each.id: each for each in configurations}
    found = duplicates(space, configurations)

    # No token kind is residualised there, so two of three levels repeat the first.
    assert len(found) == 256
    for copy, first in found.items():
        assert by_id[copy].pooling == by_id[first].pooling == "tokens"
        assert replace(by_id[copy], residualize="none") == by_id[first]
    table = configuration_table(space, configurations)
    assert table["config_id"].to_list() == [each.id for each in configurations]
    assert table["duplicate_of"].null_count() == 512


def test_equal_names_mean_equal_content_and_different_ones_different_content() -> None:
    space = shipped("demo_sweep")
    stage2 = space.stage2(shortlist(*((each, "linear_probe") for each in space.stage1())))
    stage3 = space.stage3(
        shortlist(*((each, kind.name) for each in stage2[:5] for kind in space.kinds[2:7]))
    )
    swept = [
        use.swept for each in (*space.stage1(), *stage2, *stage3) for use in uses_of(space, each)
    ]
    by_name = {(each.name, json.dumps(each.content, sort_keys=True)) for each in swept}

    assert len({name for name, _ in by_name}) == len({text for _, text in by_name}) == len(by_name)
    assert all(each.recipe.name == each.name for each in swept)
    assert all(each.recipe.content() == each.template.content() for each in swept)


def test_the_eleven_attention_variants_are_eight_fits() -> None:
    assert len({each.label for each in ATTENTION_VARIANTS}) == len(ATTENTION_VARIANTS) == 11
    for mode in ("light", "full"):
        content = [json.dumps(each.content(mode), sort_keys=True) for each in ATTENTION_VARIANTS]
        assert len(set(content)) == 8
    label = {each.label: each.content("full") for each in ATTENTION_VARIANTS}
    assert label["full_1024_sum"] == label["full_2048_sum"] != label["full_1024_mean"]
    assert label["light_1_mean"] == label["light_1_sum"]
    assert label["light_4_mean"] != label["light_4_sum"]
    light = AttentionVariant(mode="light", last_n=4)
    assert light.content("light") != light.content("full")


def test_stage_two_crosses_the_shortlist_with_attention_and_finds_twins() -> None:
    space = shipped("sweep")
    parent = space.stage1()[0]
    found = space.stage2(shortlist((parent, "linear_probe")))

    assert [each.attention for each in found] == [each.label for each in ATTENTION_VARIANTS]
    assert roles(space, found[0]) == roles(space, parent)
    looking = roles(space, found[1])
    assert looking["vertical_attention_baseline", "none"] == "candidate"
    assert looking["linear_probe", "none"] == "companion"
    assert sorted(
        next(str(each.attention) for each in found if each.id == copy)
        for copy in duplicates(space, found)
    ) == ["full_2048_mean", "full_2048_sum", "light_1_sum"]


def test_attention_variants_of_mean_and_token_parents_are_one_fit() -> None:
    space = shipped("sweep")
    parents = [each for each in space.stage1() if each.residualize == "none"]
    mean, tokens = parents[0], next(each for each in parents if each.pooling == "tokens")
    assert replace(mean, pooling="tokens") == tokens
    found = space.stage2(shortlist((mean, "linear_probe"), (tokens, "attention_probe")))

    assert len(duplicates(space, found)) == 3 + 10


def test_stage_three_varies_only_what_the_kind_reads() -> None:
    space = shipped("sweep")
    binary = replace(space.stage1()[0], stage="stage2", attention="off")
    signed = next(
        replace(each, stage="stage2", attention="off")
        for each in space.stage1()
        if each.target == "importance_signed" and each.pooling == "tokens"
    )
    sizes = {
        (parent.target, kind): len(space.stage3(shortlist((parent, kind))))
        for parent, kind in product(
            (binary, signed), ("linear_probe", "mlp_probe", "attention_probe", "multimax_probe")
        )
    }
    assert sizes == {
        ("anchor_binary", "linear_probe"): 5,
        ("anchor_binary", "mlp_probe"): 6,
        ("anchor_binary", "attention_probe"): 16,
        ("anchor_binary", "multimax_probe"): 32,
        ("importance_signed", "linear_probe"): 5,
        ("importance_signed", "mlp_probe"): 6,
        ("importance_signed", "attention_probe"): 32,
        ("importance_signed", "multimax_probe"): 64,
    }
    tuned = space.stage3(shortlist((binary, "mlp_probe")))
    assert not duplicates(space, tuned)
    found = roles(space, tuned[0])
    assert found == {
        ("position_baseline", "none"): "baseline",
        ("text_only_baseline", "none"): "baseline",
        ("mlp_probe", "none"): "candidate",
    }
    assert {
        use.swept.template.hidden
        for each in tuned
        for use in uses_of(space, each)
        if use.role == "candidate"
    } == {(50,), (100,), (100, 100)}


def test_a_tuned_setting_that_the_kind_had_anyway_is_no_new_fit() -> None:
    space = shipped("sweep")
    parent = replace(space.stage1()[1], stage="stage2", attention="off")
    assert parent.residualize == "position"
    tuned = space.stage3(shortlist((parent, "linear_probe")))
    before = {use.swept.name for use in uses_of(space, parent)}
    after = [
        {use.swept.name for use in uses_of(space, each) if use.role == "candidate"}
        for each in tuned
    ]

    assert [len(each) for each in after] == [1] * 5
    assert sum(each <= before for each in after) == 1


def test_other_targets_have_their_own_factors() -> None:
    space = space_of(
        demo_with(
            sweep={
                "targets": ["exceeds_threshold", "windowed_change"],
                "thresholds": [0.1, 0.2],
                "windows": [1, 4, 8],
                "drop_last_sentence": [False, True],
                "poolings": ["mean"],
                "residualize": ["none"],
            }
        )
    )
    found = space.stage1()

    assert len(found) == 2 * 2 * (2 + 3)
    assert {(each.threshold, each.window, each.percentile) for each in found} == {
        (0.1, None, None),
        (0.2, None, None),
        (None, 1, None),
        (None, 4, None),
        (None, 8, None),
    }
    assert not any(each.drop_last_sentence for each in found)


def test_without_the_mean_nothing_pooled_comes_along_with_tokens() -> None:
    space = space_of(demo_with(sweep={"poolings": ["tokens"]}))
    kinds = {use.kind for each in space.stage1() for use in uses_of(space, each)}

    assert "linear_probe" not in kinds
    assert {"attention_probe", "position_baseline"} <= kinds


def test_a_shortlist_of_another_stage_or_study_is_refused() -> None:
    space = shipped("demo_sweep")
    first = space.stage1()[0]

    with pytest.raises(ConfigError, match="of stage1 where one of stage2"):
        space.stage3(shortlist((first, "linear_probe")))
    with pytest.raises(ConfigError, match="'other_probe'"):
        space.stage3(shortlist((replace(first, stage="stage2"), "other_probe")))


def test_the_default_variants_are_those_that_the_study_s_attention_yields() -> None:
    study = load_study("demo_sweep", environ={})
    assert study.sweep is not None
    sweep = study.sweep.model_copy(update={"attention": None})
    recipes = study.probes.recipes
    at = {
        mode: [
            each.label
            for each in sweep.variants(
                recipes, study.attention.model_copy(update={"mode": mode, "last_n": 4})
            )
        ]
        for mode in ("off", "light", "full")
    }
    assert at["off"] == ["off"]
    assert at["light"] == ["off", "light_1_mean", "light_4_mean", "light_1_sum", "light_4_sum"]
    assert len(at["full"]) == 11
    blind = [each for each in recipes if "vertical_attention" not in each.features]
    assert len(sweep.variants(blind, study.attention)) == 1


RECIPES = [
    {"name": "position_baseline", "features": ["position"]},
    {"name": "text_only_baseline", "features": ["text"]},
    {"name": "linear_probe", "features": ["activations"]},
    {"name": "attention_probe", "features": ["tokens"], "estimator": "attention"},
]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sweep": {"percentiles": [85, 85]}}, "more than once"),
        ({"sweep": {"poolings": ["last"]}}, "which activations.poolings lacks"),
        ({"sweep": {"residualized": ["linear"]}}, r"\['linear'\], which probes.recipes lacks"),
        ({"sweep": {"shortlists": {"protocol": "holdout"}}}, "splits.protocols lacks"),
        ({"sweep": {"attention": [{"mode": "light"}]}}, "light without last_n"),
        ({"sweep": {"attention": [{"mode": "off", "last_n": 2}]}}, "last_n with mode off"),
        ({"sweep": {"attention": [{"mode": "full"}, {"mode": "full"}]}}, "more than once"),
        ({"attention": {"mode": "light"}}, "attention variant full_mean, which needs mode: full"),
        (
            {"labels": {"drop_last_sentence": True}, "sweep": {"drop_last_sentence": [False]}},
            "last sentence out",
        ),
        (
            {"probes": {"recipes": RECIPES}, "sweep": {"attention": [{"mode": "full"}]}},
            "no recipe reads vertical attention",
        ),
        (
            {"probes": {"recipes": RECIPES[:3]}, "sweep": {"attention": None}},
            "no recipe reads tokens",
        ),
        (
            {
                "probes": {"recipes": [*RECIPES, {**RECIPES[2], "name": "again"}]},
                "sweep": {"attention": None},
            },
            "differ in nothing but",
        ),
        (
            {
                "probes": {"recipes": [*RECIPES, {**RECIPES[2], "name": "b", "percentile": 90}]},
                "sweep": {"attention": None},
            },
            "recipe b sets percentile",
        ),
    ],
)
def test_what_a_sweep_cannot_have_is_said_with_its_remedy(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        demo_with(**changes)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["sweep", "demo_sweep"])
def test_the_shipped_sweeps_are_sound(name: str) -> None:
    study = load_study(name, environ={})

    assert study.name == name
    assert study.probes.keep == "scores"
    assert not study.labels.drop_last_sentence


def test_the_demo_campaign_is_small() -> None:
    space = shipped("demo_sweep")
    first = space.stage1()
    second = space.stage2(shortlist(*((each, "linear_probe") for each in first[:4])))
    third = space.stage3(shortlist((second[0], "multimax_probe"), (second[1], "mlp_probe")))

    assert (len(first), len(second), len(third)) == (32, 20, 4 + 2)
    assert len(duplicates(space, second)) >= 4


@pytest.mark.parametrize("estimator", ["attention", "multimax", "rolling_multimax"])
@pytest.mark.parametrize("target", ["anchor_binary", "importance_abs"])
def test_what_a_token_recipe_does_not_read_is_in_no_fit(estimator: str, target: str) -> None:
    recipe = ProbeRecipe.model_validate(
        {"name": "probe", "features": ("tokens",), "estimator": estimator, "target": target}
    )
    unread = {"window"} if estimator != "rolling_multimax" else set()
    unread |= {"training"} if estimator == "attention" else set()
    unread |= {"loss"} if target == "anchor_binary" else set()
    known = recipe.token_probe.model_dump(mode="json")
    others = {"window": 3, "training": "soft", "loss": "squared"}
    assert set(recipe.content()["token_probe"]) == set(known) - unread
    for name, value in others.items():
        changed = recipe.model_copy(
            update={"token_probe": TokenProbe.model_validate(known | {name: value})}
        )
        assert (changed.content() == recipe.content()) is (name in unread)
